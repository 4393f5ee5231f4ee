// smartkv_ext._core: what the torch-free core knows about itself. Links no torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "smartkv/isa.h"
#include "smartkv/layout.h"
#include "smartkv/levels.h"

namespace py = pybind11;

namespace smartkv {
namespace {

template <typename T, size_t N>
std::vector<int> as_vector(const T (&values)[N]) {
  return {values, values + N};
}

std::string joined(const std::vector<int>& values) {
  std::string text;
  for (const int value : values) text += (text.empty() ? "" : ", ") + std::to_string(value);
  return text;
}

void check_one_of(const char* name, int value, const std::vector<int>& accepted) {
  for (const int item : accepted) {
    if (item == value) return;
  }
  throw py::value_error(std::string(name) + " must be one of " + joined(accepted) + "; got " +
                        std::to_string(value));
}

py::dict layout_dict(int tier, int head_dim, int itemsize) {
  check_one_of("tier", tier, as_vector(TIERS));
  check_one_of("head_dim", head_dim, as_vector(HEAD_DIMS));
  check_one_of("itemsize", itemsize, {2, 4});
  const PageLayout layout = page_layout(tier, head_dim, itemsize);
  py::dict out;
  out["tier"] = layout.tier;
  out["k_bits"] = layout.k_bits;
  out["v_bits"] = layout.v_bits;
  out["head_dim"] = layout.head_dim;
  out["itemsize"] = layout.itemsize;
  out["k_codes"] = layout.k_codes;
  out["v_codes"] = layout.v_codes;
  out["k_scale"] = layout.k_scale;
  out["v_scale"] = layout.v_scale;
  out["position"] = layout.position;
  out["score"] = layout.score;
  out["page_bytes"] = layout.page_bytes;
  return out;
}

std::vector<float> level_table(int bits, const std::string& levels) {
  check_one_of("bits", bits, {2, 3, 4, 8});
  if (levels != "uniform" && levels != "gaussian") {
    throw py::value_error("levels must be one of uniform, gaussian; got '" + levels + "'");
  }
  std::vector<float> table;
  for (int code = 0; code < 1 << bits; ++code) {
    table.push_back(level_of(bits, levels == "uniform" ? Levels::UNIFORM : Levels::GAUSSIAN, code));
  }
  return table;
}

py::dict build_info() {
  py::dict info;
  info["version"] = SMARTKV_VERSION;
  info["compiler"] = __VERSION__;
  info["cxx_flags"] = SMARTKV_CXX_FLAGS;
  info["cuda"] = SMARTKV_CUDA != 0;
  return info;
}

}  // namespace
}  // namespace smartkv

PYBIND11_MODULE(_core, m) {
  m.doc() = "The torch-free core of smartkv_ext: build information, kernel sets, page layout.";
  m.attr("PAGE_SIZE") = smartkv::PAGE_SIZE;
  m.attr("PAGE_FORMAT_VERSION") = smartkv::PAGE_FORMAT_VERSION;
  m.attr("MAX_TIERS") = smartkv::MAX_TIERS;
  m.attr("TIERS") = py::tuple(py::cast(smartkv::as_vector(smartkv::TIERS)));
  m.attr("HEAD_DIMS") = py::tuple(py::cast(smartkv::as_vector(smartkv::HEAD_DIMS)));
  m.def("build_info", &smartkv::build_info,
        "Version, compiler, flags, and whether CUDA was built.");
  m.def("cpu_features", &smartkv::cpu_features,
        "Detected instruction set extensions that a kernel set uses.");
  m.def("available_kernel_sets", &smartkv::available_kernel_sets,
        "Kernel sets that this CPU can run, best first.");
  m.def("kernel_set_name", &smartkv::kernel_set_name,
        "The kernel set of this process. RuntimeError if SMARTKV_ISA names one that cannot run.");
  m.def("page_layout", &smartkv::layout_dict, py::arg("tier"), py::arg("head_dim"),
        py::arg("itemsize") = 2, "Byte offsets of the sections of a page, and its size.");
  m.def("level_table", &smartkv::level_table, py::arg("bits"), py::arg("levels"),
        "The 2**bits reconstruction levels, ascending.");
}
