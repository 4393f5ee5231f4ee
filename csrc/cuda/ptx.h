// Instructions that CUDA C++ has no name for. The only inline assembly of the kernels: under any
// other compiler than nvcc each of them is the SIMT shim's.
#pragma once

#include "cuda_prelude.h"

#ifndef __CUDACC__
#include "simt/tensor.h"
#endif

namespace smartkv {

#ifdef __CUDACC__

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// Starts a copy of 16 bytes to shared memory, past the L1 cache; both sides 16-byte aligned. With
// `valid` false nothing is read and zeros are written.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid = true) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Until at most PENDING groups of this thread are on their way. Other threads see the data after a
// barrier only.
template <int PENDING>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane 8i + r points to row r of matrix i.
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// An 8x8 matrix that the lanes of a warp hold, as in a fragment of mma: rows become columns.
__device__ __forceinline__ unsigned transpose_matrix(unsigned value) {
  unsigned out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;\n" : "=r"(out) : "r"(value));
  return out;
}

// Byte i of the result is byte `selector nibble i & 7` of (low, high); with bit 3 set in the
// nibble, eight copies of that byte's sign. Not __byte_perm, which drops bit 3.
__device__ __forceinline__ unsigned permute_bytes(unsigned low, unsigned high, unsigned selector) {
  unsigned out;
  asm("prmt.b32 %0, %1, %2, %3;\n" : "=r"(out) : "r"(low), "r"(high), "r"(selector));
  return out;
}

// The larger one; NaN where one of them is, which fmaxf would drop.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

#define SMARTKV_MMA(TYPE)                                                     \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE         \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))

// d[16, 8] += a[16, 16] b[16, 8] on tensor cores.
__device__ __forceinline__ void multiply_fp16(float (&d)[4], const unsigned (&a)[4],
                                              const unsigned (&b)[2]) {
  SMARTKV_MMA("f16");
}
__device__ __forceinline__ void multiply_bf16(float (&d)[4], const unsigned (&a)[4],
                                              const unsigned (&b)[2]) {
  SMARTKV_MMA("bf16");
}
#undef SMARTKV_MMA

#else

inline void copy_async(void* shared, const void* global, bool valid = true,
                       simt::Place where = simt::Place::current()) {
  simt::copy_async(shared, global, valid || !simt::is_enabled(where) ? 16 : 0, where);
}
inline void commit_copies() { simt::commit_group(); }
template <int PENDING>
inline void wait_copies(simt::Place where = simt::Place::current()) {
  if (simt::is_enabled(where)) simt::wait_group(PENDING);
}
inline void load_matrices(unsigned (&r)[4], const void* row,
                          simt::Place where = simt::Place::current()) {
  simt::load_matrices(r, 4, false, row, where);
}
inline void load_matrices_transposed(unsigned (&r)[4], const void* row,
                                     simt::Place where = simt::Place::current()) {
  simt::load_matrices(r, 4, true, row, where);
}
inline unsigned transpose_matrix(unsigned value, simt::Place where = simt::Place::current()) {
  return simt::transpose_matrix(value, where);
}
inline unsigned permute_bytes(unsigned low, unsigned high, unsigned selector) {
  return simt::permute_bytes(low, high, selector);
}
inline float max_or_nan(float a, float b) { return simt::max_or_nan(a, b); }
inline void multiply_fp16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                          simt::Place where = simt::Place::current()) {
  simt::multiply(simt::Element::FLOAT16, d, a, b, where);
}
inline void multiply_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                          simt::Place where = simt::Place::current()) {
  simt::multiply(simt::Element::BFLOAT16, d, a, b, where);
}

#endif

}  // namespace smartkv
