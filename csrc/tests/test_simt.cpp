// The CUDA kernels on the CPU, against double precision and against the CPU kernels.
#include "cuda_ops.h"
#include "simt/block.h"
#include "simt/self_test.h"
#include "testing.h"

using namespace smartkv;

namespace {

// A problem in buffers of exactly its size, so that AddressSanitizer sees a step outside.
struct Merge {
  DType dtype;
  int64_t num_states, rows;
  int head_dim;
  testing::Dense o;
  std::vector<uint8_t> input;
  std::vector<float> lse;

  Merge(DType dtype, int64_t num_states, int64_t rows, int head_dim)
      : dtype(dtype),
        num_states(num_states),
        rows(rows),
        head_dim(head_dim),
        o(dtype, static_cast<int>(num_states), 1, rows, head_dim),
        lse(testing::normals(num_states * rows, 3)) {
    o.fill_normal();
    for (int64_t i = 0; i < num_states * rows; ++i) {
      const int kind = testing::random_int(0, 9);
      if (kind == 0) lse[i] = -1e4f;
      if (kind == 1 || (rows > 1 && i % rows == rows / 2)) lse[i] = -INFINITY;
    }
    for (int64_t i = 0; i < num_states * rows; ++i) {
      if (weight(i) > 0 || testing::random_int(0, 2) == 0) continue;
      for (int c = 0; c < head_dim; ++c) o.set(i * head_dim + c, NAN);
    }
    input.assign(o.bytes.begin(), o.bytes.begin() + o.size() * dtype_size(dtype));
  }

  double merged_lse(int64_t row) const {
    double top = -INFINITY, total = 0;
    for (int64_t s = 0; s < num_states; ++s) top = std::fmax(top, lse[s * rows + row]);
    if (top == -INFINITY) return top;
    for (int64_t s = 0; s < num_states; ++s) total += std::exp(lse[s * rows + row] - top);
    return top + std::log(total);
  }

  // Of a state of a row; zero where float32 has zero.
  double weight(int64_t i) const {
    return lse[i] == -INFINITY ? 0 : static_cast<float>(std::exp(lse[i] - merged_lse(i % rows)));
  }
};

struct Merged {
  std::vector<uint8_t> out;
  std::vector<float> lse;

  explicit Merged(const Merge& m)
      : out(m.rows * m.head_dim * dtype_size(m.dtype), 0xff), lse(m.rows, NAN) {}

  MergeStatesParams params(const Merge& m) {
    return {m.input.data(), m.lse.data(), out.data(), lse.data(),
            m.dtype,        m.num_states, m.rows,     m.head_dim};
  }

  std::vector<float> values(const Merge& m) const {
    testing::Dense dense(m.dtype, 1, 1, m.rows, m.head_dim);
    std::copy(out.begin(), out.end(), dense.bytes.begin());
    std::vector<float> x(dense.size());
    for (size_t i = 0; i < x.size(); ++i) x[i] = dense.get(static_cast<int64_t>(i));
    return x;
  }
};

void check_merge(const Merge& m, const Merged& merged, const Merged& by_cpu) {
  const float rounding = m.dtype == DType::FLOAT32    ? 0
                         : m.dtype == DType::BFLOAT16 ? 0x1p-8f
                                                      : 0x1p-11f;
  const std::vector<float> out = merged.values(m), cpu = by_cpu.values(m);
  for (int64_t row = 0; row < m.rows; ++row) {
    const double lse = m.merged_lse(row);
    // The weights are exp(lse - merged): they inherit the rounding of the two in float32.
    const double slack = 1e-5 + (std::isinf(lse) ? 0 : std::fabs(lse) * 0x1p-23);
    const auto close = [&](double a, double b) { return a == b || std::fabs(a - b) <= slack; };
    CHECK(close(merged.lse[row], lse), "row %d: %g, not %g", int(row), merged.lse[row], lse);
    CHECK(close(merged.lse[row], by_cpu.lse[row]));
    std::vector<double> expected(m.head_dim);
    for (int64_t i = row; i < m.num_states * m.rows; i += m.rows) {
      const double weight = m.weight(i);
      if (weight == 0) continue;
      for (int c = 0; c < m.head_dim; ++c) expected[c] += weight * m.o.get(i * m.head_dim + c);
    }
    for (int c = 0; c < m.head_dim; ++c) {
      const float x = out[row * m.head_dim + c], y = cpu[row * m.head_dim + c];
      const double bound = slack * (1 + std::fabs(x)) + rounding * std::fabs(x);
      CHECK(std::fabs(x - expected[c]) <= bound, "row %d: %g, not %g", int(row), x, expected[c]);
      CHECK(std::fabs(x - y) <= 2 * bound, "row %d: %g, not %g", int(row), x, y);
    }
  }
}

void test_merge_states(DType dtype, int head_dim) {
  for (int64_t rows : {0, 1, 3, 4, 5, 130}) {
    for (int64_t num_states : {1, 2, 7, 33}) {
      const Merge m(dtype, num_states, rows, head_dim);
      Merged by_cpu(m), first(m);
      cpu_kernels().merge_states(by_cpu.params(m), testing::parallel());
      for (int seed = 0; seed < 3; ++seed) {
        simt::set_seed(seed);
        Merged merged(m);
        const char* const error = merge_states_cuda(merged.params(m), nullptr);
        CHECK(error == nullptr, "%s", error);
        if (seed == 0) {
          first = merged;
          check_merge(m, merged, by_cpu);
        }
        CHECK(merged.out == first.out && merged.lse == first.lse, "differs with seed %d", seed);
      }
    }
  }
  simt::set_seed(0);
}

}  // namespace

int main() {
  simt::self_test();
  simt::tensor_test();
  for (DType dtype : {DType::FLOAT32, DType::BFLOAT16, DType::FLOAT16}) {
    for (int head_dim : HEAD_DIMS) test_merge_states(dtype, head_dim);
  }
  return testing::report("test_simt");
}
