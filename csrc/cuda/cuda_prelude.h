// What kernel sources include in place of the CUDA headers. Under nvcc it is CUDA; under any other
// compiler it is the SIMT shim of the tests, which runs the same source on the CPU.
#pragma once

#include <type_traits>

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// SMARTKV_LAUNCH(kernel, grid, block, shared_bytes, stream, args...). Parentheses around a kernel
// whose name has a comma.
#define SMARTKV_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__)

// SMARTKV_SHARED(tile, float[4][32]): shared memory of a block, without initial value.
#define SMARTKV_SHARED(name, ...) __shared__ __align__(16) std::type_identity_t<__VA_ARGS__> name

// SMARTKV_DYNAMIC_SHARED(scratch, float): a pointer to the shared_bytes of the launch.
#define SMARTKV_DYNAMIC_SHARED(name, ...)                                  \
  extern __shared__ __align__(128) unsigned char smartkv_dynamic_shared[]; \
  __VA_ARGS__* const name = reinterpret_cast<__VA_ARGS__*>(smartkv_dynamic_shared)

#else

#include "simt/cuda.h"

#define SMARTKV_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  simt::launch(kernel, grid, block, shared_bytes, stream __VA_OPT__(, ) __VA_ARGS__)

#define SMARTKV_SHARED(name, ...)                                \
  static char smartkv_key_of_##name;                             \
  auto& name = *static_cast<std::type_identity_t<__VA_ARGS__>*>( \
      simt::shared_memory(&smartkv_key_of_##name, sizeof(std::type_identity_t<__VA_ARGS__>)))

#define SMARTKV_DYNAMIC_SHARED(name, ...) \
  __VA_ARGS__* const name = static_cast<__VA_ARGS__*>(simt::dynamic_shared_memory())

#endif
