// The CUDA kernels on the shim as a kernel set like those of the CPU, so that tests can be the
// same.
#pragma once

#include <stdexcept>

#include "cuda_ops.h"
#include "simt/block.h"
#include "testing.h"

namespace testing {

// Memory of a launch: exactly as much as it asked for, and no value that one could rely on.
struct Workspace {
  std::vector<unsigned char> bytes;
  explicit Workspace(size_t count) : bytes(count) {
    for (size_t i = 0; i < count; ++i) bytes[i] = static_cast<unsigned char>(158 * i + 91 + i / 7);
  }
  void* data() { return bytes.data(); }
};

inline void expect_launch(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

template <auto WORKSPACE, auto LAUNCH>
constexpr auto WITH_WORKSPACE = [](const auto& p, const smartkv::Parallel&) {
  Workspace workspace(WORKSPACE(p));
  expect_launch(LAUNCH(p, workspace.data(), nullptr));
};

template <auto LAUNCH>
constexpr auto WITHOUT_WORKSPACE =
    [](const auto& p, const smartkv::Parallel&) { expect_launch(LAUNCH(p, nullptr)); };

inline smartkv::KernelTable cuda_table() {
  using namespace smartkv;
  KernelTable table{};
  table.name = "cuda";
  table.quantize_kv = WITHOUT_WORKSPACE<quantize_kv_cuda>;
  table.dequantize_kv = WITHOUT_WORKSPACE<dequantize_kv_cuda>;
  table.append_kv = WITH_WORKSPACE<append_kv_workspace, append_kv_cuda>;
  table.compact_kv = WITH_WORKSPACE<compact_kv_workspace, compact_kv_cuda>;
  table.decode_attention = WITH_WORKSPACE<decode_attention_workspace, decode_attention_cuda>;
  table.attention_mass = WITH_WORKSPACE<attention_mass_workspace, attention_mass_cuda>;
  table.select_kv = WITH_WORKSPACE<select_kv_workspace, select_kv_cuda>;
  table.merge_states = WITHOUT_WORKSPACE<merge_states_cuda>;
  table.gate_score = WITHOUT_WORKSPACE<gate_score_cuda>;
  table.change_basis = WITHOUT_WORKSPACE<change_basis_cuda>;
  return table;
}

}  // namespace testing
