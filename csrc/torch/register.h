// One implementation of an op serves every device: the kernels are chosen by where the tensors are.
#pragma once

#include <torch/csrc/stable/library.h>

// SMARTKV_REGISTER_OPS(m) { m.impl("op", TORCH_BOX(&op)); } in namespace smartkv::binding.
#define SMARTKV_REGISTER_OPS(library)                                      \
  static void register_ops(torch::stable::detail::StableLibrary& library); \
  STABLE_TORCH_LIBRARY_IMPL(smartkv, CPU, m) { register_ops(m); }          \
  SMARTKV_REGISTER_ON_CUDA                                                 \
  static void register_ops(torch::stable::detail::StableLibrary& library)

#ifdef SMARTKV_WITH_CUDA
#define SMARTKV_REGISTER_ON_CUDA \
  STABLE_TORCH_LIBRARY_IMPL(smartkv, CUDA, m) { register_ops(m); }
#else
#define SMARTKV_REGISTER_ON_CUDA
#endif
