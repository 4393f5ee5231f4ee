// What a quantised key has had subtracted: its head's mean key, part of which turns with the
// position p: mean + sum over the turns of cos(a) U + sin(a) V, a = p * step, where 2^32 is a whole
// turn. RoPE turns the mean that keys have before it by such angles. Twin of
// smartkv_ext/reference/turns.py.
#pragma once

#include <cstdint>

namespace smartkv {

constexpr int MAX_TURNS = 8;

// Those of a cache.
// With weights, what a key's mean leaves of it is multiplied by them before it is rotated, and
// queries are divided by them: noise then falls where queries are small.
struct Turns {
  const uint16_t* vectors;  // [batch, num_kv_heads, count, 2, head_dim] float16: U and V
  const int32_t* steps;     // [batch, num_kv_heads, count]
  int count;                // at most MAX_TURNS; 0: none, and no pointers to them
  const float* weights;     // [batch, num_kv_heads, head_dim], or null: ones
};

// Of one (sequence, KV head).
struct KeyShift {
  const float* mean;        // [head_dim]
  const uint16_t* vectors;  // [turns, 2, head_dim] float16
  const int32_t* steps;     // [turns]
  int turns;
  const float* weights;  // [head_dim] or null
};

constexpr KeyShift shift_of_head(const float* k_mean, const Turns& turns, int64_t head,
                                 int head_dim) {
  const float* const mean = k_mean + head * head_dim;
  const float* const weights = turns.weights == nullptr ? nullptr : turns.weights + head * head_dim;
  if (turns.count == 0) return {mean, nullptr, nullptr, 0, weights};
  return {mean, turns.vectors + head * turns.count * 2 * head_dim, turns.steps + head * turns.count,
          turns.count, weights};
}

// Sine and cosine of the angle z half turns, |z| <= 1, are the polynomials z S(z^2) and C(z^2).
// They are off by 6e-6 and 4e-5, which leaves that part of a mean in the codes: all that matters is
// that keys and queries take the same. One term less costs a tenth of the arithmetic.
struct Wave {
  static constexpr int TERMS = 5;
  static constexpr float SIN[TERMS] = {3.14152789f, -5.16640186f, 2.54271293f, -0.58185941f,
                                       0.0640261695f};
  static constexpr float COS[TERMS] = {0.999959767f, -4.93276024f, 4.04208946f, -1.28755546f,
                                       0.178306863f};
  static constexpr float HALF_TURNS_PER_UNIT = 1.0f / (1u << 31);
};

}  // namespace smartkv
