// The kernel set that runs everywhere: 128-bit vectors of the compiler's default target.
#include "kernel_prelude.h"

#define SMARTKV_ISA portable

#include "kernels.h"
