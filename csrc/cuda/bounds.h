// Tests that keep a thread inside its data. They have names so that the mutation tests of the SIMT
// shim can turn them off, one at a time, to see whether the tests would notice.
#pragma once

#include "cuda_prelude.h"

namespace smartkv {

#ifdef __CUDACC__

template <typename T>
__device__ __forceinline__ bool is_within(T i, std::type_identity_t<T> end) {
  return i < end;
}

template <typename T>
__device__ __forceinline__ T clamp_to(T low, std::type_identity_t<T> x,
                                      std::type_identity_t<T> high) {
  return max(low, min(x, high));
}

#else

template <typename T>
bool is_within(T i, std::type_identity_t<T> end, simt::Place where = simt::Place::current()) {
  return i < end || !simt::is_enabled(where);
}

template <typename T>
T clamp_to(T low, std::type_identity_t<T> x, std::type_identity_t<T> high,
           simt::Place where = simt::Place::current()) {
  return simt::is_enabled(where) ? max(low, min(x, high)) : x;
}

#endif

}  // namespace smartkv
