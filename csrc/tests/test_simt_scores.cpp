// select_kv on the shim, equal to the CPU's, and gate_score against double precision.
#include "basis_problem.h"
#include "cuda_table.h"
#include "gate_problem.h"
#include "not_finite.h"

using namespace smartkv;

namespace {

const KernelTable CUDA = testing::cuda_table();

void test_select(int64_t groups, int64_t heads, int64_t n, int num_tiers, bool in_full_precision) {
  std::vector<float> scores = testing::normals(groups * heads * n);
  std::vector<int8_t> current(scores.size()), expected(scores.size()), tiers(scores.size());
  std::vector<int64_t> budgets(groups);
  for (size_t i = 0; i < scores.size(); ++i) {
    if (i % 7 == 0) scores[i] = std::round(scores[i]);  // ties, and -0
    if (i % 31 == 0) scores[i] = i % 2 ? -INFINITY : NAN;
    if (i % 41 == 0) scores[i] = INFINITY;
    const int lowest = i % 13 == 0 ? -1 : 0;
    const int tier = in_full_precision ? num_tiers : testing::random_int(lowest, num_tiers);
    current[i] = static_cast<int8_t>(tier);
  }
  SelectParams p{};
  const double distortion[MAX_TIERS] = {0.25, 0.1, 0.07, 0.03, 0.02, 4e-5, 0};
  for (int t = 0; t < num_tiers; ++t) {
    p.page_bytes[t] = page_layout(TIERS[t], 128).page_bytes;
    p.distortion[t] = distortion[t];
  }
  for (int64_t& budget : budgets)
    budget = testing::random_int(0, static_cast<int>(heads * n * 150));
  p.scores = scores.data();
  p.current = current.data();
  p.budgets = budgets.data();
  p.evict_distortion = 1;
  p.zipf_offset = 64;
  p.num_tiers = num_tiers;
  p.groups = groups;
  p.heads = heads;
  p.n = n;
  p.tiers = expected.data();
  cpu_kernels().select_kv(p, testing::parallel());
  p.tiers = tiers.data();
  std::fill(tiers.begin(), tiers.end(), 77);
  CUDA.select_kv(p, testing::parallel());
  CHECK(tiers == expected, "%d groups, %d heads, %d tokens", int(groups), int(heads), int(n));
}

}  // namespace

int main() {
  int seed = 0;
  for (int num_tiers : {1, 3, MAX_TIERS}) {
    for (const auto& [heads, n] : {std::pair{1, 1}, {1, 65}, {3, 130}, {8, 400}, {500, 3}}) {
      simt::set_seed(seed++);
      test_select(seed % 2 + 1, heads, n, num_tiers, seed % 2 == 0);
    }
  }
  // Few tokens, and float32: as exact as on the CPU. Others round to bfloat16 at each layer.
  check_gate(CUDA, {80, 24, 7, 1}, DType::FLOAT32);
  check_gate(CUDA, {256, 20, 1}, DType::BFLOAT16, 3);
  check_gate(CUDA, {80, 24, 7, 1}, DType::FLOAT16, 1);
  check_gate(CUDA, {128, 256, 256, 1}, DType::BFLOAT16, 1);
  check_gate(CUDA, {64, 300, 1}, DType::FLOAT16, 33);
  constexpr double ROUNDED = 0.12;  // scores are of order 10
  check_gate(CUDA, {64, 64, 1}, DType::BFLOAT16, 130, ROUNDED);
  check_gate(CUDA, {80, 40, 1}, DType::FLOAT16, 33, ROUNDED);
  check_gate(CUDA, {96, 70, 30, 1}, DType::BFLOAT16, 40, ROUNDED);
  check_gate(CUDA, {128, 256, 256, 1}, DType::BFLOAT16, 129, ROUNDED);
  check_gate_keeps_nan(CUDA, {64, 16, 1}, DType::FLOAT32, 3);
  check_gate_keeps_nan(CUDA, {80, 24, 7, 1}, DType::BFLOAT16, 1);
  check_gate_keeps_nan(CUDA, {64, 40, 1}, DType::BFLOAT16, 40);
  check_gate_keeps_nan(CUDA, {64, 70, 30, 1}, DType::FLOAT16, 40);
  check_merge_keeps_nan(CUDA);
  for (DType dtype : {DType::FLOAT32, DType::BFLOAT16, DType::FLOAT16}) {
    check_change_basis(CUDA, dtype, 80, 1);
    check_change_basis(CUDA, dtype, 256, 9);
  }
  return testing::report("test_simt_scores");
}
