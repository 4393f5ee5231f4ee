// Chooses the kernel set of the process.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "smartkv/isa.h"
#include "smartkv/params.h"

namespace smartkv {

namespace portable {
const KernelTable& kernel_table();
}
#if defined(__x86_64__)
namespace avx2 {
const KernelTable& kernel_table();
}
namespace avx512 {
const KernelTable& kernel_table();
}
#endif

namespace {

struct Feature {
  const char* name;
  bool present;
};

#if defined(__x86_64__)
std::vector<Feature> detect_features() {
  __builtin_cpu_init();
  return {{"avx2", __builtin_cpu_supports("avx2") != 0},
          {"fma", __builtin_cpu_supports("fma") != 0},
          {"f16c", __builtin_cpu_supports("f16c") != 0},
          {"avx512f", __builtin_cpu_supports("avx512f") != 0},
          {"avx512bw", __builtin_cpu_supports("avx512bw") != 0},
          {"avx512dq", __builtin_cpu_supports("avx512dq") != 0},
          {"avx512vl", __builtin_cpu_supports("avx512vl") != 0},
          {"avx512vbmi", __builtin_cpu_supports("avx512vbmi") != 0},
          {"avx512vnni", __builtin_cpu_supports("avx512vnni") != 0},
          {"avx512bf16", __builtin_cpu_supports("avx512bf16") != 0}};
}

// True when each of the first `count` features is present; they are listed in the order in which
// the kernel sets need them.
bool has_first(size_t count) {
  const std::vector<Feature> features = detect_features();
  for (size_t i = 0; i < count; ++i) {
    if (!features[i].present) return false;
  }
  return true;
}
#else
std::vector<Feature> detect_features() { return {}; }
#endif

struct KernelSet {
  const char* name;
  bool (*runs_here)();
  const KernelTable& (*table)();
};

const KernelSet KERNEL_SETS[] = {
#if defined(__x86_64__)
    {"avx512", [] { return has_first(9); }, avx512::kernel_table},
    {"avx2", [] { return has_first(3); }, avx2::kernel_table},
#endif
    {"portable", [] { return true; }, portable::kernel_table},
};

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const KernelTable& choose_kernels() {
  const char* forced = std::getenv("SMARTKV_ISA");
  if (forced == nullptr || *forced == '\0') return kernel_set(available_kernel_sets().front());
  try {
    return kernel_set(forced);
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(std::string("SMARTKV_ISA=") + forced + ": " + error.what());
  }
}

}  // namespace

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
  for (const Feature& feature : detect_features()) {
    if (feature.present) names.emplace_back(feature.name);
  }
  return names;
}

std::vector<std::string> available_kernel_sets() {
  std::vector<std::string> names;
  for (const KernelSet& set : KERNEL_SETS) {
    if (set.runs_here()) names.emplace_back(set.name);
  }
  return names;
}

const KernelTable& kernel_set(const std::string& name) {
  for (const KernelSet& set : KERNEL_SETS) {
    if (name != set.name) continue;
    if (set.runs_here()) return set.table();
    throw std::runtime_error("this CPU cannot run the kernel set '" + name +
                             "'; available: " + joined(available_kernel_sets()));
  }
  throw std::runtime_error("unknown kernel set '" + name +
                           "'; available: " + joined(available_kernel_sets()));
}

const KernelTable& cpu_kernels() {
  static const KernelTable& table = choose_kernels();
  return table;
}

const char* kernel_set_name() { return cpu_kernels().name; }

}  // namespace smartkv
