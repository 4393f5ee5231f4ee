// Reconstruction levels: small integers held in floats. Twin of smartkv_ext/reference/levels.py.
#pragma once

#include <cstdint>
#include <limits>

#include "smartkv/params.h"

namespace smartkv {

// Lloyd-Max levels of N(0, 1), positive half, times 127 / outermost level, rounded.
constexpr float GAUSSIAN_HALF_2[] = {38, 127};
constexpr float GAUSSIAN_HALF_3[] = {14, 45, 79, 127};
constexpr float GAUSSIAN_HALF_4[] = {6, 18, 31, 44, 58, 75, 96, 127};

// Standard deviations per unit of level: the first guess of a scale is rms * gaussian_unit.
constexpr float gaussian_unit(int bits) {
  const double outermost = bits == 2 ? 1.5104 : bits == 3 ? 2.1520 : 2.7326;
  return static_cast<float>(outermost / 127);
}

constexpr float gaussian_half(int bits, int i) {
  return bits == 2 ? GAUSSIAN_HALF_2[i] : bits == 3 ? GAUSSIAN_HALF_3[i] : GAUSSIAN_HALF_4[i];
}

// Level of a code of 2, 3, 4 or 8 bits; 8 bits are always uniform.
constexpr float level_of(int bits, Levels levels, int code) {
  if (bits == 8) return static_cast<float>(code - 128);
  const int half = 1 << (bits - 1);
  if (levels == Levels::UNIFORM) return static_cast<float>(2 * code - (2 * half - 1));
  return code >= half ? gaussian_half(bits, code - half) : -gaussian_half(bits, half - 1 - code);
}

// Tables of at most 16 entries (bits <= 4). `level` repeats, so that index bits above the code
// may hold anything; `midpoint[i]` parts code i from code i + 1, infinite behind the last.
struct Codebook {
  alignas(64) float level[16];
  alignas(64) float midpoint[16];
  alignas(16) int8_t level_byte[16];
};

constexpr Codebook make_codebook(int bits, Levels levels) {
  Codebook book{};
  if (bits > 4) return book;
  const int count = 1 << bits;
  for (int i = 0; i < 16; ++i) {
    book.level[i] = level_of(bits, levels, i % count);
    book.level_byte[i] = static_cast<int8_t>(book.level[i]);
  }
  for (int i = 0; i < 16; ++i) {
    book.midpoint[i] = i + 1 < count ? (book.level[i] + book.level[i + 1]) / 2
                                     : std::numeric_limits<float>::infinity();
  }
  return book;
}

}  // namespace smartkv
