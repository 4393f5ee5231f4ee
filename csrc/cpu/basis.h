// change_basis: rows less an origin, times the matrix of their KV head, plus a shift.
#pragma once

namespace smartkv::SMARTKV_ISA {

constexpr int BASIS_ROWS = 64;
constexpr int64_t FEW_PRODUCTS = 1 << 20;  // below, waking another thread takes longer

inline void add_row(float* x, const float* y, float factor, int count) {
  for (int c = 0; c < count; c += 16) store(x + c, fma(splat(factor), load(y + c), load(x + c)));
}

// Rows [first, first + count) of the query heads of one KV head, counted head by head.
inline void change_rows(const ChangeBasisParams& p, int64_t item, int64_t first, int count,
                        float* x, float* y) {
  const int64_t b = item / p.num_kv_heads, kv_head = item % p.num_kv_heads;
  const int group = p.num_heads / p.num_kv_heads, d = p.head_dim;
  const auto head_of = [&](int64_t row) { return kv_head * group + row / p.n; };
  for (int r = 0; r < count; ++r) {
    const int64_t row = first + r;
    load_row(x + r * d, row_of(p.x, b, head_of(row), row % p.n), p.x.dtype, d);
    if (p.origin != nullptr) add_row(x + r * d, p.origin + kv_head * d, -1, d);
  }
  gemm<false>({x, d, p.matrix + kv_head * d * d, d, y, d, d}, count, d);
  for (int r = 0; r < count; ++r) {
    const int64_t row = first + r;
    if (p.shift != nullptr) add_row(y + r * d, p.shift + kv_head * d, 1, d);
    const int64_t at_row = (b * p.num_heads + head_of(row)) * p.n + row % p.n;
    store_row(at(p.out, p.x.dtype, at_row * d), p.x.dtype, y + r * d, d);
  }
}

inline void change_basis(const ChangeBasisParams& p, const Parallel& parallel) {
  const int64_t rows = p.num_heads / p.num_kv_heads * p.n;
  const int64_t tiles = (rows + BASIS_ROWS - 1) / BASIS_ROWS;
  const int64_t items = int64_t{p.batch} * p.num_kv_heads * tiles;
  const int64_t products = int64_t{p.batch} * p.num_heads * p.n * p.head_dim * p.head_dim;
  const auto run = [&](int64_t begin, int64_t end) {
    alignas(64) float x[BASIS_ROWS * MAX_HEAD_DIM], y[BASIS_ROWS * MAX_HEAD_DIM];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % tiles * BASIS_ROWS, left = rows - first;
      change_rows(p, i / tiles, first, static_cast<int>(left < BASIS_ROWS ? left : BASIS_ROWS), x,
                  y);
    }
  };
  if (products < FEW_PRODUCTS) return run(0, items);
  parallel_for(parallel, items, run);
}

}  // namespace smartkv::SMARTKV_ISA
