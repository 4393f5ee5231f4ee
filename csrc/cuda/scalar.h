// Values of the three dtypes to and from float, and reductions over lanes.
#pragma once

#include "bounds.h"
#include "ptx.h"
#include "smartkv/layout.h"

namespace smartkv {

constexpr int constexpr_max(int a, int b) { return a > b ? a : b; }

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename scalar_t>
__device__ __forceinline__ scalar_t from_float(float x);
template <>
__device__ __forceinline__ float from_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}

__device__ __forceinline__ float load_value(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::FLOAT32) return static_cast<const float*>(p)[i];
  if (dtype == DType::BFLOAT16) return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
  return to_float(static_cast<const __half*>(p)[i]);
}

__device__ __forceinline__ void store_value(void* p, DType dtype, int64_t i, float x) {
  if (dtype == DType::FLOAT32) {
    static_cast<float*>(p)[i] = x;
  } else if (dtype == DType::BFLOAT16) {
    static_cast<__nv_bfloat16*>(p)[i] = __float2bfloat16_rn(x);
  } else {
    static_cast<__half*>(p)[i] = __float2half_rn(x);
  }
}

// As the CPU kernels round a score: every NaN becomes 0x7fc0.
__device__ __forceinline__ uint16_t score_bits(float x) {
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

__device__ __forceinline__ const char* row_of(const HeadsView& x, int64_t b, int64_t h, int64_t n) {
  const int64_t element = b * x.stride_b + h * x.stride_h + n * x.stride_n;
  return static_cast<const char*>(x.data) + element * dtype_size(x.dtype);
}

// Over the lanes that differ from this one in the bits of `LANES - 1`; every lane gets the result.
template <int LANES>
__device__ __forceinline__ float sum_lanes(float x) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) {
    x = __fadd_rn(x, __shfl_xor_sync(ALL_LANES, x, mask));
  }
  return x;
}
template <int LANES>
__device__ __forceinline__ float max_lanes(float x) {
#pragma unroll
  for (int mask = LANES / 2; mask > 0; mask /= 2) {
    x = max_or_nan(x, __shfl_xor_sync(ALL_LANES, x, mask));
  }
  return x;
}

// Calls body with head_dim as a compile-time constant; the bindings let no other one pass.
#define SMARTKV_HEAD_DIM_SWITCH(head_dim, ...) \
  [&] {                                        \
    switch (head_dim) {                        \
      case 64: {                               \
        constexpr int HEAD_DIM = 64;           \
        return __VA_ARGS__();                  \
      }                                        \
      case 80: {                               \
        constexpr int HEAD_DIM = 80;           \
        return __VA_ARGS__();                  \
      }                                        \
      case 96: {                               \
        constexpr int HEAD_DIM = 96;           \
        return __VA_ARGS__();                  \
      }                                        \
      case 128: {                              \
        constexpr int HEAD_DIM = 128;          \
        return __VA_ARGS__();                  \
      }                                        \
      default: {                               \
        constexpr int HEAD_DIM = MAX_HEAD_DIM; \
        return __VA_ARGS__();                  \
      }                                        \
    }                                          \
  }()

// For a lambda that is inlined whatever its size: if it is not, the kernel's arguments that it
// captures move to the stack.
#define SMARTKV_FORCED __attribute__((always_inline))

// The same for a tier.
#define SMARTKV_TIER_SWITCH(tier, ...) \
  [&] {                                \
    switch (tier) {                    \
      case 2: {                        \
        constexpr int TIER = 2;        \
        return __VA_ARGS__();          \
      }                                \
      case 302: {                      \
        constexpr int TIER = 302;      \
        return __VA_ARGS__();          \
      }                                \
      case 3: {                        \
        constexpr int TIER = 3;        \
        return __VA_ARGS__();          \
      }                                \
      case 403: {                      \
        constexpr int TIER = 403;      \
        return __VA_ARGS__();          \
      }                                \
      case 4: {                        \
        constexpr int TIER = 4;        \
        return __VA_ARGS__();          \
      }                                \
      case 8: {                        \
        constexpr int TIER = 8;        \
        return __VA_ARGS__();          \
      }                                \
      default: {                       \
        constexpr int TIER = 16;       \
        return __VA_ARGS__();          \
      }                                \
    }                                  \
  }()

// Of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// Of a grid whose blocks stride over their items: enough for the scheduler of the GPU to even out
// what takes longer.
inline int64_t most_blocks() {
  return int64_t{32} * device_attribute(cudaDevAttrMultiProcessorCount);
}

// What a launcher returns: nullptr, or why the launch failed.
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace smartkv
