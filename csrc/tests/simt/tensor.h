// cp.async, ldmatrix, movmatrix and mma for an ordinary C++ compiler, with the lane layouts of the
// PTX manual. Kernels reach them through csrc/cuda/ptx.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <source_location>

namespace simt {

using Place = std::source_location;

// Copies 16 bytes (of which the first `bytes`, the others zero) once this thread waits for them.
// Until then the destination is poisoned: whoever reads it too early, or still needs what was
// there, is found out.
void copy_async(void* shared, const void* global, size_t bytes, const Place& where);
void commit_group();
// Waits until at most `pending` groups of this thread are on their way.
void wait_group(int pending);

// Row addresses come from lanes 8i to 8i + 7 for matrix i; register i of a lane gets two elements.
void load_matrices(unsigned* registers, int count, bool transposed, const void* row,
                   const Place& where);
unsigned transpose_matrix(unsigned value, const Place& where);

// prmt, with the replicated sign.
inline unsigned permute_bytes(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned choice = selector >> 4 * i & 15u;
    unsigned byte = bytes >> 8 * (choice & 7) & 255u;
    if (choice & 8) byte = byte & 0x80 ? 255u : 0u;
    out |= byte << 8 * i;
  }
  return out;
}

// max.NaN.
inline float max_or_nan(float a, float b) {
  return std::isnan(a) || std::isnan(b) ? NAN : std::max(a, b);
}

enum class Element { FLOAT16, BFLOAT16 };

// d += a * b: m16n8k16, row.col, float32 accumulators.
void multiply(Element element, float* d, const unsigned* a, const unsigned* b, const Place& where);

}  // namespace simt
