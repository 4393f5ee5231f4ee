// The kernel set for AVX2, FMA and F16C.
#if defined(__x86_64__)

#include "kernel_prelude.h"

#define SMARTKV_ISA avx2
#define SMARTKV_AVX2

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
