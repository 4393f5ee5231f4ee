// merge_states and gate_score against plain double precision.
#include "gate_problem.h"

using namespace smartkv;
using testing::Dense;
using testing::is_close;

namespace {

void test_merge(const KernelTable& kernels) {
  Dense o(DType::FLOAT32, 3, 1, 4, 64), out(DType::FLOAT32, 1, 1, 4, 64);
  o.fill_normal();
  std::vector<float> lse = testing::normals(12), merged(4);
  lse[1] = -INFINITY;  // an empty state may hold anything
  for (int d = 0; d < 64; ++d) o.set(64 + d, NAN);
  for (int s = 0; s < 3; ++s) lse[s * 4 + 3] = -INFINITY;
  kernels.merge_states(
      {o.bytes.data(), lse.data(), out.bytes.data(), merged.data(), o.dtype, 3, 4, 64},
      testing::parallel(2));
  for (int row = 0; row < 4; ++row) {
    double total = 0;
    for (int s = 0; s < 3; ++s) total += std::exp(double{lse[s * 4 + row]});
    CHECK(is_close(merged[row], std::log(total), 1e-6));
    for (int d = 0; d < 64; ++d) {
      double want = 0;
      for (int s = 0; s < 3; ++s) {
        const double weight = total > 0 ? std::exp(double{lse[s * 4 + row]}) / total : 0;
        if (weight > 0) want += weight * o.get((s * 4 + row) * 64 + d);
      }
      CHECK(is_close(out.get(row * 64 + d), want, 1e-6));
    }
  }
}

// The score of a key that is NaN is NaN, which select_kv does not take.
void test_gate_keeps_nan(const KernelTable& kernels) {
  testing::Dense keys(DType::FLOAT32, 1, 1, 3, 64);
  keys.fill_normal();
  keys.set(keys.index(0, 0, 1) + 5, NAN);
  const HeadsView view = keys.view();
  const std::vector<float> hidden(16 * 64, 0.1f), last(16, 0.1f);
  float scores[3] = {};
  GateScoreParams p{};
  p.keys = &view;
  p.weights[0] = hidden.data();
  p.weights[1] = last.data();
  p.biases[0] = p.biases[1] = last.data();
  p.num_linear = 2;
  p.sizes[0] = 64;
  p.sizes[1] = 16;
  p.sizes[2] = 1;
  p.scores = scores;
  p.num_layers = p.batch = p.num_kv_heads = 1;
  p.kv_len = 3;
  kernels.gate_score(p, testing::parallel(1));
  for (int i = 0; i < 3; ++i) CHECK(std::isnan(scores[i]) == (i == 1), "score %d", i);
}

}  // namespace

int main() {
  for (const KernelTable* kernels : testing::all_kernels()) {
    test_merge(*kernels);
    test_gate_keeps_nan(*kernels);
    check_gate(*kernels, {128, 32, 1}, DType::BFLOAT16);
    check_gate(*kernels, {80, 24, 7, 1}, DType::FLOAT32);
  }
  return testing::report("scores");
}
