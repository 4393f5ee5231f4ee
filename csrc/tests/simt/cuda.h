// CUDA C++ for an ordinary C++ compiler: the part of the language and of the runtime that our
// kernels use. They include it through csrc/cuda/cuda_prelude.h.
// cp.async, ldmatrix and mma: simt/tensor.h.
#pragma once

#include <math.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#include "simt/block.h"
#include "simt/half.h"
#include "simt/sites.h"
#include "simt/vector_types.h"

// Language

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __noinline__ __attribute__((noinline))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// No __shared__: SMARTKV_SHARED is poisoned, and checked by AddressSanitizer.

constexpr int warpSize = simt::WARP_SIZE;

using std::max;
using std::min;

// Runtime

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };

namespace simt {

constexpr size_t DEFAULT_DYNAMIC_SHARED = 48 << 10;  // more is asked for by cudaFuncSetAttribute
constexpr size_t MAX_DYNAMIC_SHARED = 163 << 10;     // of sm_80

inline int num_multiprocessors = 3;  // tests may change it

// Granted by cudaFuncSetAttribute.
inline std::map<const void*, size_t> dynamic_shared_of;

inline cudaError_t last_error = cudaSuccess;

inline cudaError_t check_shape(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > MAX_THREADS || block.z > 64 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 0xffffu || grid.z > 0xffffu) {
    return cudaErrorInvalidConfiguration;
  }
  const auto granted = dynamic_shared_of.find(kernel);
  const size_t most = granted == dynamic_shared_of.end() ? DEFAULT_DYNAMIC_SHARED : granted->second;
  return shared_bytes > most ? cudaErrorInvalidValue : cudaSuccess;
}

// kernel<<<grid, block, shared_bytes, stream>>>(args...), done when it returns. What the launch is
// refused for goes where CUDA puts it; what is wrong inside the kernel is thrown as simt::Error.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Args&&... args) {
  static_assert((!std::is_reference_v<Params> && ...), "a kernel takes its arguments by value");
  const cudaError_t error =
      check_shape(reinterpret_cast<const void*>(kernel), grid, block, shared_bytes);
  if (error != cudaSuccess) {
    last_error = error;
    return;
  }
  const std::tuple<Params...> params(std::forward<Args>(args)...);
  run_grid(grid, block, shared_bytes, [&] { std::apply(kernel, params); });
}

}  // namespace simt

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > simt::MAX_DYNAMIC_SHARED) {
    return simt::last_error = cudaErrorInvalidValue;
  }
  simt::dynamic_shared_of[reinterpret_cast<const void*>(kernel)] = static_cast<size_t>(value);
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? simt::num_multiprocessors
                                                       : static_cast<int>(simt::MAX_DYNAMIC_SHARED);
  return cudaSuccess;
}

inline cudaError_t cudaPeekAtLastError() { return simt::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  return error == cudaErrorInvalidValue ? "invalid argument" : "no error";
}

// Barriers

namespace simt {

using Place = std::source_location;

inline int barrier(Op op, int predicate, const Place& where) {
  return static_cast<int>(meet({op, where, 0, predicate != 0, 0, WARP_SIZE}));
}

inline unsigned vote(Op op, unsigned mask, int predicate, const Place& where) {
  return static_cast<unsigned>(meet({op, where, mask, predicate != 0, 0, WARP_SIZE}));
}

// `run` sees the operands of all lanes that take part, and may change them: captureless, so that
// its address says which call it is.
template <typename T, typename F>
void warp_operation(const char* name, unsigned mask, bool whole_warp, T& operand,
                    const Place& where, F) {
  Request request{Op::WARP, where, mask, 0, 0, WARP_SIZE};
  request.run = [](void* const* lanes) {
    T* typed[WARP_SIZE];
    for (int l = 0; l < WARP_SIZE; ++l) typed[l] = static_cast<T*>(lanes[l]);
    F()(typed);
  };
  request.lane_operand = &operand;
  request.name = name;
  request.whole_warp = whole_warp;
  meet(request);
}

template <typename T>
T shuffle(Op op, unsigned mask, T value, int operand, int width, const Place& where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = meet({op, where, mask, bits, operand, width});
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace simt

inline void __syncthreads(simt::Place where = simt::Place::current()) {
  if (simt::is_enabled(where)) simt::barrier(simt::Op::SYNCTHREADS, 0, where);
}
inline int __syncthreads_count(int predicate, simt::Place where = simt::Place::current()) {
  return simt::barrier(simt::Op::SYNCTHREADS_COUNT, predicate, where);
}
inline int __syncthreads_and(int predicate, simt::Place where = simt::Place::current()) {
  return simt::barrier(simt::Op::SYNCTHREADS_AND, predicate, where);
}
inline int __syncthreads_or(int predicate, simt::Place where = simt::Place::current()) {
  return simt::barrier(simt::Op::SYNCTHREADS_OR, predicate, where);
}
inline void __syncwarp(unsigned mask = ~0u, simt::Place where = simt::Place::current()) {
  if (simt::is_enabled(where)) simt::vote(simt::Op::SYNCWARP, mask, 0, where);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Shuffles and votes

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane, int width = simt::WARP_SIZE,
              simt::Place where = simt::Place::current()) {
  return simt::shuffle(simt::Op::SHFL, mask, value, lane, width, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = simt::WARP_SIZE,
                 simt::Place where = simt::Place::current()) {
  return simt::shuffle(simt::Op::SHFL_UP, mask, value, distance & 31, width, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = simt::WARP_SIZE,
                   simt::Place where = simt::Place::current()) {
  return simt::shuffle(simt::Op::SHFL_DOWN, mask, value, distance & 31, width, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = simt::WARP_SIZE,
                  simt::Place where = simt::Place::current()) {
  return simt::shuffle(simt::Op::SHFL_XOR, mask, value, lane_mask & 31, width, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              simt::Place where = simt::Place::current()) {
  return simt::vote(simt::Op::BALLOT, mask, predicate, where);
}
inline int __any_sync(unsigned mask, int predicate, simt::Place where = simt::Place::current()) {
  return static_cast<int>(simt::vote(simt::Op::ANY, mask, predicate, where));
}
inline int __all_sync(unsigned mask, int predicate, simt::Place where = simt::Place::current()) {
  return static_cast<int>(simt::vote(simt::Op::ALL, mask, predicate, where));
}

template <typename T>
T __reduce_max_sync(unsigned mask, T value, simt::Place where = simt::Place::current()) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  simt::warp_operation("__reduce_max_sync", mask, false, value, where, [](T* const* lanes) {
    T top = 0;
    bool first = true;
    for (int l = 0; l < simt::WARP_SIZE; ++l) {
      if (lanes[l] == nullptr) continue;
      top = first ? *lanes[l] : std::max(top, *lanes[l]);
      first = false;
    }
    for (int l = 0; l < simt::WARP_SIZE; ++l) {
      if (lanes[l] != nullptr) *lanes[l] = top;
    }
  });
  return value;
}

inline unsigned __match_any_sync(unsigned mask, unsigned value,
                                 simt::Place where = simt::Place::current()) {
  simt::warp_operation("__match_any_sync", mask, false, value, where, [](unsigned* const* lanes) {
    unsigned same[simt::WARP_SIZE] = {};
    for (int l = 0; l < simt::WARP_SIZE; ++l) {
      for (int other = 0; other < simt::WARP_SIZE; ++other) {
        const bool both = lanes[l] != nullptr && lanes[other] != nullptr;
        if (both && *lanes[l] == *lanes[other]) same[l] |= 1u << other;
      }
    }
    for (int l = 0; l < simt::WARP_SIZE; ++l) {
      if (lanes[l] != nullptr) *lanes[l] = same[l];
    }
  });
  return value;
}

// Atomics: other threads may have their turn before one

namespace simt {

template <typename T, typename F>
T update(T* address, const Place& where, F&& next) {
  meet({Op::YIELD, where, 0, 0, 0, WARP_SIZE});
  const T old = *address;
  *address = static_cast<T>(next(old));
  return old;
}

template <typename T>
using Same = std::type_identity_t<T>;

}  // namespace simt

template <typename T>
T atomicAdd(T* address, simt::Same<T> value, simt::Place where = simt::Place::current()) {
  return simt::update(address, where, [=](T old) { return old + value; });
}
template <typename T>
T atomicMin(T* address, simt::Same<T> value, simt::Place where = simt::Place::current()) {
  static_assert(std::is_integral_v<T>);
  return simt::update(address, where, [=](T old) { return std::min(old, value); });
}
template <typename T>
T atomicMax(T* address, simt::Same<T> value, simt::Place where = simt::Place::current()) {
  static_assert(std::is_integral_v<T>);
  return simt::update(address, where, [=](T old) { return std::max(old, value); });
}
template <typename T>
T atomicAnd(T* address, simt::Same<T> value, simt::Place where = simt::Place::current()) {
  return simt::update(address, where, [=](T old) { return old & value; });
}
template <typename T>
T atomicOr(T* address, simt::Same<T> value, simt::Place where = simt::Place::current()) {
  return simt::update(address, where, [=](T old) { return old | value; });
}
template <typename T>
T atomicExch(T* address, simt::Same<T> value, simt::Place where = simt::Place::current()) {
  return simt::update(address, where, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, simt::Same<T> expected, simt::Same<T> value,
            simt::Place where = simt::Place::current()) {
  static_assert(std::is_integral_v<T>);
  return simt::update(address, where, [=](T old) { return old == expected ? value : old; });
}

// Arithmetic

inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
