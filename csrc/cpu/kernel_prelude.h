// Everything that must be seen before the target of a kernel set is chosen: an inline function of a
// standard header compiled for AVX-512 could be the copy that the linker keeps for the whole
// program, and crash on a smaller CPU.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "attention_plan.h"
#include "memory.h"
#include "select_kv.h"
#include "smartkv/hadamard.h"
#include "smartkv/layout.h"
#include "smartkv/levels.h"
#include "smartkv/params.h"
