// change_basis against plain double precision.
#pragma once

#include "testing.h"

inline void check_change_basis(const smartkv::KernelTable& kernels, smartkv::DType dtype,
                               int head_dim, int64_t n) {
  constexpr int HEADS = 6, KV_HEADS = 2, BATCH = 2;
  using smartkv::DType;
  using testing::Dense;
  Dense x(dtype, BATCH, HEADS, n, head_dim), out(dtype, BATCH, HEADS, n, head_dim);
  x.fill_normal();
  const std::vector<float> matrix = testing::normals(KV_HEADS * head_dim * head_dim);
  const std::vector<float> shift = testing::normals(KV_HEADS * head_dim);
  const std::vector<float> origin = testing::normals(KV_HEADS * head_dim);
  for (bool is_affine : {true, false}) {
    const float* const less = is_affine ? origin.data() : nullptr;
    const float* const added = is_affine ? shift.data() : nullptr;
    kernels.change_basis({x.view(), matrix.data(), less, added, out.bytes.data(), BATCH, HEADS,
                          KV_HEADS, head_dim, n},
                         testing::parallel(2));
    for (int64_t row = 0; row < BATCH * HEADS * n; ++row) {
      const int64_t kv_head = row / n % HEADS / (HEADS / KV_HEADS);
      for (int c = 0; c < head_dim; ++c) {
        double want = added == nullptr ? 0 : added[kv_head * head_dim + c];
        double size = std::fabs(want);
        for (int k = 0; k < head_dim; ++k) {
          const double from = less == nullptr ? 0 : less[kv_head * head_dim + k];
          const double term = (x.get(row * head_dim + k) - from) *
                              double{matrix[(kv_head * head_dim + k) * head_dim + c]};
          want += term;
          size += std::fabs(term);
        }
        const double rounding = dtype == DType::FLOAT32   ? 0
                                : dtype == DType::FLOAT16 ? std::fabs(want) / 1024
                                                          : std::fabs(want) / 128;
        CHECK(std::fabs(out.get(row * head_dim + c) - want) <= 1e-6 * size + rounding,
              "%s: row %d: %g, not %g", kernels.name, int(row), out.get(row * head_dim + c), want);
      }
    }
  }
}
