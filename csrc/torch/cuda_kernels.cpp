// The CUDA kernels as a kernel set. Compiled only where nvcc is found.
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"
#include "cuda_ops.h"
#include "place.h"

// Lives in libtorch_cuda. Weak, so that this build also loads on a CPU-only torch, where it is
// null.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace smartkv::binding {
namespace {

int32_t current_device() { return torch::stable::accelerator::getCurrentDeviceIndex(); }

void* current_stream() {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(current_device(), &stream));
  return stream;
}

void check_launch(const char* error) {
  check(error == nullptr, "a CUDA kernel could not be launched: ", error == nullptr ? "" : error);
}

template <auto LAUNCH>
constexpr auto WITHOUT_WORKSPACE =
    [](const auto& params, const Parallel&) { check_launch(LAUNCH(params, current_stream())); };

// torch's allocator keeps the workspace of a stream until the kernels on it are done.
template <auto WORKSPACE, auto LAUNCH>
constexpr auto WITH_WORKSPACE = [](const auto& params, const Parallel&) {
  const torch::stable::Device device(torch::headeronly::DeviceType::CUDA, current_device());
  const Tensor workspace = torch::stable::empty({static_cast<int64_t>(WORKSPACE(params))},
                                                ScalarType::Byte, std::nullopt, device);
  check_launch(LAUNCH(params, workspace.mutable_data_ptr(), current_stream()));
};

KernelTable make_table() {
  KernelTable table{};
  table.name = "cuda";
  table.quantize_kv = WITHOUT_WORKSPACE<quantize_kv_cuda>;
  table.dequantize_kv = WITHOUT_WORKSPACE<dequantize_kv_cuda>;
  table.append_kv = WITH_WORKSPACE<append_kv_workspace, append_kv_cuda>;
  table.compact_kv = WITH_WORKSPACE<compact_kv_workspace, compact_kv_cuda>;
  table.decode_attention = WITH_WORKSPACE<decode_attention_workspace, decode_attention_cuda>;
  table.attention_mass = WITH_WORKSPACE<attention_mass_workspace, attention_mass_cuda>;
  table.merge_states = WITHOUT_WORKSPACE<merge_states_cuda>;
  table.gate_score = WITHOUT_WORKSPACE<gate_score_cuda>;
  table.change_basis = WITHOUT_WORKSPACE<change_basis_cuda>;
  table.select_kv = WITH_WORKSPACE<select_kv_workspace, select_kv_cuda>;
  return table;
}

}  // namespace

const KernelTable& cuda_kernels() {
  check(aoti_torch_get_current_cuda_stream != nullptr,
        "CUDA tensors need a torch that was built with CUDA");
  static const KernelTable table = make_table();
  return table;
}

}  // namespace smartkv::binding
