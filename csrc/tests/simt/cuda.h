// CUDA C++ for an ordinary C++ compiler: the part of the language and of the runtime that our
// kernels use. They include it through csrc/cuda/cuda_prelude.h.
// cp.async, ldmatrix and mma go into a header of their own beside this one.
#pragma once

#include <math.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <tuple>
#include <type_traits>
#include <utility>

#include "simt/block.h"
#include "simt/half.h"
#include "simt/vector_types.h"

// Language

#define __global__
#define __device__
#define __host__
#define __constant__ static
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

constexpr size_t MAX_DYNAMIC_SHARED = 48 << 10;  // more is asked for by cudaFuncSetAttribute

inline cudaError_t last_error = cudaSuccess;

inline cudaError_t check_shape(dim3 grid, dim3 block, size_t shared_bytes) {
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > MAX_THREADS || block.z > 64 || grid.x == 0 || grid.y == 0 ||
      grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 0xffffu || grid.z > 0xffffu) {
    return cudaErrorInvalidConfiguration;
  }
  return shared_bytes > MAX_DYNAMIC_SHARED ? cudaErrorInvalidValue : cudaSuccess;
}

// kernel<<<grid, block, shared_bytes, stream>>>(args...), done when it returns. What the launch is
// refused for goes where CUDA puts it; what is wrong inside the kernel is thrown as simt::Error.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Args&&... args) {
  static_assert((!std::is_reference_v<Params> && ...), "a kernel takes its arguments by value");
  const cudaError_t error = check_shape(grid, block, shared_bytes);
  if (error != cudaSuccess) {
    last_error = error;
    return;
  }
  const std::tuple<Params...> params(std::forward<Args>(args)...);
  run_grid(grid, block, shared_bytes, [&] { std::apply(kernel, params); });
}

}  // namespace simt

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
  simt::barrier(simt::Op::SYNCTHREADS, 0, where);
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
  simt::vote(simt::Op::SYNCWARP, mask, 0, where);
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
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
