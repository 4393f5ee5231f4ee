// The kernel set for AVX-512 F, BW, DQ, VL, VBMI and VNNI.
#if defined(__x86_64__)

#if !defined(__clang__)
// GCC 12 takes the deliberately undefined registers of its own AVX-512 headers for mistakes.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include "kernel_prelude.h"

#define SMARTKV_ISA avx512
#define SMARTKV_AVX512

#if defined(__clang__)
#pragma clang attribute push(                                                            \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi," \
                          "avx512vnni,prefer-vector-width=512"))),                       \
    apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni")
#pragma GCC target("prefer-vector-width=512")
#endif

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
