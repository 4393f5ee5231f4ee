// merge_states: combines attention states over disjoint keys by their log-sum-exp.
#pragma once

namespace smartkv::SMARTKV_ISA {

// out = sum over states of exp(lse - merged) o. States of weight zero may hold NaN.
inline void merge_row(const MergeStatesParams& p, int64_t row) {
  float top = -INFINITY;
  for (int64_t s = 0; s < p.num_states; ++s) {
    const float lse = p.lse[s * p.rows + row];
    top = lse > top || lse != lse ? lse : top;  // NaN stays
  }
  float total = 0;
  if (top != -INFINITY) {
    for (int64_t s = 0; s < p.num_states; ++s) total += ::expf(p.lse[s * p.rows + row] - top);
  }
  const float merged = top == -INFINITY ? top : top + ::logf(total);
  p.out_lse[row] = merged;
  alignas(64) float o[MAX_HEAD_DIM], sum[MAX_HEAD_DIM];
  __builtin_memset(sum, 0, sizeof sum);
  for (int64_t s = 0; s < p.num_states; ++s) {
    const float lse = p.lse[s * p.rows + row];
    const float weight = lse == -INFINITY ? 0.0f : ::expf(lse - merged);
    if (weight == 0) continue;
    load_row(o, at(p.o, p.dtype, (s * p.rows + row) * p.head_dim), p.dtype, p.head_dim);
    for (int c = 0; c < p.head_dim; c += 16) {
      store(sum + c, fma(splat(weight), load(o + c), load(sum + c)));
    }
  }
  store_row(at(p.out, p.dtype, row * p.head_dim), p.dtype, sum, p.head_dim);
}

inline void merge_states(const MergeStatesParams& p, const Parallel& parallel) {
  parallel_for(parallel, p.rows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) merge_row(p, row);
  });
}

}  // namespace smartkv::SMARTKV_ISA
