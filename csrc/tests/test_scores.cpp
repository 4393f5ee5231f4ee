// merge_states and gate_score against plain double precision.
#include "testing.h"

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

void test_gate(const KernelTable& kernels, const std::vector<int>& sizes, DType dtype) {
  const int layers = 2, batch = 2, heads = 2, n = 70;
  std::vector<Dense> keys(layers, Dense(dtype, batch, heads, n, sizes[0]));
  std::vector<HeadsView> views;
  for (Dense& k : keys) {
    k.fill_normal();
    views.push_back(k.view());
  }
  std::vector<std::vector<float>> weights, biases;
  std::vector<float> scores(layers * batch * heads * n);
  GateScoreParams p{};
  p.keys = views.data();
  p.num_linear = static_cast<int>(sizes.size()) - 1;
  for (int i = 0; i < p.num_linear; ++i) {
    weights.push_back(testing::normals(layers * heads * sizes[i] * sizes[i + 1], 0.2f));
    biases.push_back(testing::normals(layers * heads * sizes[i + 1]));
  }
  for (int i = 0; i < p.num_linear; ++i) {
    p.weights[i] = weights[i].data();
    p.biases[i] = biases[i].data();
  }
  std::copy(sizes.begin(), sizes.end(), p.sizes);
  p.scores = scores.data();
  p.num_layers = layers;
  p.batch = batch;
  p.num_kv_heads = heads;
  p.kv_len = n;
  kernels.gate_score(p, testing::parallel(3));
  for (int item = 0; item < layers * batch * heads * n; ++item) {
    const int token = item % n, h = item / n % heads, b = item / n / heads % batch;
    const int layer = item / n / heads / batch, at = layer * heads + h;
    std::vector<double> x;
    for (int d = 0; d < sizes[0]; ++d) {
      x.push_back(keys[layer].get(keys[layer].index(b, h, token) + d));
    }
    for (int i = 0; i < p.num_linear; ++i) {
      std::vector<double> y;
      for (int o = 0; o < sizes[i + 1]; ++o) {
        double sum = biases[i][at * sizes[i + 1] + o];
        const float* row = weights[i].data() + (int64_t{at} * sizes[i + 1] + o) * sizes[i];
        for (int d = 0; d < sizes[i]; ++d) sum += row[d] * x[d];
        y.push_back(i + 1 < p.num_linear ? std::max(sum, 0.0) : sum);
      }
      x = y;
    }
    CHECK(is_close(scores[item], x[0], 1e-4), "%s: %g, not %g", kernels.name, scores[item], x[0]);
  }
}

}  // namespace

int main() {
  for (const KernelTable* kernels : testing::all_kernels()) {
    test_merge(*kernels);
    test_gate(*kernels, {128, 32, 1}, DType::BFLOAT16);
    test_gate(*kernels, {80, 24, 7, 1}, DType::FLOAT32);
  }
  return testing::report("scores");
}
