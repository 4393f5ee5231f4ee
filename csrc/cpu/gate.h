// gate_score: the learned scorer, a small MLP over the keys of each head.
#pragma once

namespace smartkv::SMARTKV_ISA {

// A tile of activations is [width][64 tokens]; weights [out][in] multiply it from the left.
struct GateScratch {
  float* x;
  float* y;
};

inline int gate_width(const GateScoreParams& p) {
  int width = 0;
  for (int i = 0; i <= p.num_linear; ++i) width = p.sizes[i] > width ? p.sizes[i] : width;
  return width;
}

inline void apply_linear(const float* weight, const float* bias, int in, int out, bool relu,
                         const float* x, float* y) {
  gemm<false>({weight, in, x, PAGE_SIZE, y, PAGE_SIZE, in}, out, PAGE_SIZE);
  const F floor = splat(relu ? 0.0f : -INFINITY);
  for (int o = 0; o < out; ++o) {
    for (int t = 0; t < PAGE_SIZE; t += 16) {
      float* at = y + o * PAGE_SIZE + t;
      store(at, vmax(floor, load(at) + splat(bias[o])));  // in this order NaN stays
    }
  }
}

// Tile `tile` of (layer, batch, head) `item`.
inline void score_tile(const GateScoreParams& p, int64_t item, int64_t tile, GateScratch scratch) {
  const int64_t head = item % p.num_kv_heads, b = item / p.num_kv_heads % p.batch;
  const int64_t layer = item / p.num_kv_heads / p.batch, first = tile * PAGE_SIZE;
  const HeadsView& keys = p.keys[layer];
  const int64_t left = p.kv_len - first;
  const Rows rows{row_of(keys, b, head, first), keys.dtype, keys.stride_n * dtype_size(keys.dtype),
                  static_cast<int>(left < PAGE_SIZE ? left : PAGE_SIZE),
                  left > PAGE_SIZE ? PAGE_SIZE * keys.stride_n * dtype_size(keys.dtype) : 0};
  float *x = scratch.x, *y = scratch.y;
  load_transposed(x, rows, no_lines(rows.data), p.sizes[0]);
  for (int i = 0; i < p.num_linear; ++i) {
    const int64_t in = p.sizes[i], out = p.sizes[i + 1], at = layer * p.num_kv_heads + head;
    apply_linear(p.weights[i] + at * out * in, p.biases[i] + at * out, p.sizes[i], p.sizes[i + 1],
                 i + 1 < p.num_linear, x, y);
    float* swap = x;
    x = y;
    y = swap;
  }
  __builtin_memcpy(p.scores + item * p.kv_len + first, x, rows.count * sizeof(float));
}

inline void gate_score(const GateScoreParams& p, const Parallel& parallel) {
  const int64_t tiles = (p.kv_len + PAGE_SIZE - 1) / PAGE_SIZE;
  const int64_t items = int64_t{p.num_layers} * p.batch * p.num_kv_heads * tiles;
  const int64_t parts = items < parallel.num_threads ? items : parallel.num_threads;
  const size_t floats = static_cast<size_t>(gate_width(p)) * PAGE_SIZE;
  const Scratch memory(parts * 2 * floats * sizeof(float));
  __builtin_memset(memory.data(), 0, parts * 2 * floats * sizeof(float));
  parallel_for(parallel, parts, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* base = reinterpret_cast<float*>(memory.data()) + part * 2 * floats;
      for (int64_t i = items * part / parts; i < items * (part + 1) / parts; ++i) {
        score_tile(p, i / tiles, i % tiles, {base, base + floats});
      }
    }
  });
}

}  // namespace smartkv::SMARTKV_ISA
