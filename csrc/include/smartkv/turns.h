// What a quantised key has had subtracted: its head's mean key, part of which turns with the
// position p: mean + sum over the turns of cos(a) U + sin(a) V, a = p * step, where 2^32 is a whole
// turn. RoPE turns the mean that keys have before it by such angles. Twin of
// smartkv_ext/reference/turns.py.
#pragma once

#include <cstdint>

namespace smartkv {

constexpr int MAX_TURNS = 8;

// Those of a cache.
struct Turns {
  const uint16_t* vectors;  // [batch, num_kv_heads, count, 2, head_dim] float16: U and V
  const int32_t* steps;     // [batch, num_kv_heads, count]
  int count;                // at most MAX_TURNS; 0: none, and no pointers
};

// Of one (sequence, KV head).
struct KeyShift {
  const float* mean;        // [head_dim]
  const uint16_t* vectors;  // [turns, 2, head_dim] float16
  const int32_t* steps;     // [turns]
  int turns;
};

constexpr KeyShift shift_of_head(const float* k_mean, const Turns& turns, int64_t head,
                                 int head_dim) {
  const float* const mean = k_mean + head * head_dim;
  if (turns.count == 0) return {mean, nullptr, nullptr, 0};
  return {mean, turns.vectors + head * turns.count * 2 * head_dim, turns.steps + head * turns.count,
          turns.count};
}

// The phase p * step splits into an even or odd number of half turns, which is a sign, and a rest
// of z quarter turns, |z| <= 1: sin = z S(z^2), cos = C(z^2). Errors below 1e-8 and 5e-8.
struct Wave {
  static constexpr float SIN[] = {1.57079629f, -0.645963360f, 0.0796884805f, -0.00467222792f,
                                  1.50820563e-4f};
  static constexpr float COS[] = {0.999999953f, -1.23369821f, 0.253650745f, -0.0208106275f,
                                  8.58190611e-4f};
  static constexpr float QUARTERS_PER_UNIT = 1.0f / (1 << 30);
};

}  // namespace smartkv
