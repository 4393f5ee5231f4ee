// Gates with random weights, in double precision, and the comparison of any kernel set with them.
#pragma once

#include "testing.h"

namespace smartkv {

// `tolerance` is relative to the scores, which are of order 1.
inline void check_gate(const KernelTable& kernels, const std::vector<int>& sizes, DType dtype,
                       int n = 70, double tolerance = 1e-4) {
  const int layers = 2, batch = 2, heads = 2;
  std::vector<testing::Dense> keys(layers, testing::Dense(dtype, batch, heads, n, sizes[0]));
  std::vector<HeadsView> views;
  for (testing::Dense& k : keys) {
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
    CHECK(testing::is_close(scores[item], x[0], tolerance), "%s: %g, not %g", kernels.name,
          scores[item], x[0]);
  }
}

}  // namespace smartkv
