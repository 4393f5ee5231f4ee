// Scores of quantised keys whose mean turns: a sine and a cosine per turn and key serve all rows.
#pragma once

namespace smartkv::SMARTKV_ISA {

SMARTKV_INLINE bool is_turned(const AttentionRun& run, const Tile& tile) {
  return run.p.cache.turns.count > 0 && !tile.is_raw();
}

// dots [rows, stride]: q . U and q . V of TURNS turns. FIRST: scores holds products.
template <int TURNS, bool FIRST>
inline void add_turns(const Tile& tile, const int32_t* steps, const float* dots, int stride,
                      const float* bias, int rows, float* scores) {
  for (int v = 0; v < PAGE_SIZE; v += 16) {
    const I position = load_words(tile.positions + v);
    SinCos at[TURNS];
    SMARTKV_UNROLL
    for (int i = 0; i < TURNS; ++i) {
      at[i] = sin_cos<false>(multiply_low(position, splat(steps[i])));
    }
    const F scale = load(tile.k_scale + v);
    for (int r = 0; r < rows; ++r) {
      float* s = scores + r * PAGE_SIZE + v;
      const float* dot = dots + r * stride;
      F x = FIRST ? fma(load(s), scale, splat(bias[r])) : load(s);
      SMARTKV_UNROLL
      for (int i = 0; i < TURNS; ++i) {
        x = fma(at[i].cos, splat(dot[2 * i]), x);
        x = fma(at[i].sin, splat(dot[2 * i + 1]), x);
      }
      store(s, x);
    }
  }
}

constexpr int TURNS_AT_ONCE = 4;  // their waves stay in registers

// Products of a block to scores.
inline void finish_turned(const AttentionRun& run, int64_t head, const Tile& tile,
                          const Workspace& w, RowBlock block, float* scores) {
  const KeyShift shift = shift_of(run.p.cache, head);
  const int stride = 2 * shift.turns;
  const float* bias = w.queries.bias + block.begin;
  const float* dots = w.queries.turns + block.begin * stride;
  for (int i = 0; i < shift.turns; i += TURNS_AT_ONCE) {
    with_rows(shift.turns - i, [&]<int TURNS>() {
      const auto add = i == 0 ? add_turns<TURNS, true> : add_turns<TURNS, false>;
      add(tile, shift.steps + i, dots + 2 * i, stride, bias, block.count, scores);
    });
  }
}

}  // namespace smartkv::SMARTKV_ISA
