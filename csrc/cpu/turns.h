// The part of a key's shift that turns with its position (smartkv/turns.h).
#pragma once

namespace smartkv::SMARTKV_ISA {

// EXACT: product and sum are rounded, as encoding needs it, which must be alike everywhere.
template <bool EXACT>
SMARTKV_INLINE F multiply_add(F a, F b, F c) {
  if constexpr (!EXACT) return fma(a, b, c);
  F product = a * b;
  keep(product);
  return product + c;
}

struct SinCos {
  F sin, cos;
};

// Of angles in units of 2^-32 turns.
template <bool EXACT>
SMARTKV_INLINE SinCos sin_cos(I angle) {
  const F z = to_float(angle) * splat(Wave::HALF_TURNS_PER_UNIT);
  F square = z * z;
  keep(square);
  const auto polynomial = [&](const float (&factor)[Wave::TERMS]) {
    F sum = splat(factor[Wave::TERMS - 1]);
    SMARTKV_UNROLL
    for (int i = Wave::TERMS - 2; i >= 0; --i) {
      sum = multiply_add<EXACT>(sum, square, splat(factor[i]));
    }
    return sum;
  };
  return {polynomial(Wave::SIN) * z, polynomial(Wave::COS)};
}

SMARTKV_INLINE void multiply_row(float* row, const float* weights, int head_dim) {
  for (int c = 0; c < head_dim; c += 16) store(row + c, load(row + c) * load(weights + c));
}
SMARTKV_INLINE void divide_row(float* row, const float* weights, int head_dim) {
  for (int c = 0; c < head_dim; c += 16) store(row + c, load(row + c) / load(weights + c));
}

// row += SIGN * what turns, at a position.
template <int SIGN>
inline void turn_row(float* row, const KeyShift& shift, int32_t position, int head_dim) {
  alignas(64) int32_t steps[16] = {};
  alignas(64) float sin[16], cos[16];
  __builtin_memcpy(steps, shift.steps, shift.turns * sizeof(int32_t));
  const SinCos at = sin_cos<true>(multiply_low(splat(position), load_words(steps)));
  store(sin, at.sin);
  store(cos, at.cos);
  const auto add = [&](const uint16_t* vector, float factor) {
    for (int c = 0; c < head_dim; c += 16) {
      store(row + c,
            multiply_add<true>(load_fp16(vector + c), splat(SIGN * factor), load(row + c)));
    }
  };
  for (int i = 0; i < shift.turns; ++i) {
    add(shift.vectors + 2 * i * head_dim, cos[i]);
    add(shift.vectors + (2 * i + 1) * head_dim, sin[i]);
  }
}

}  // namespace smartkv::SMARTKV_ISA
