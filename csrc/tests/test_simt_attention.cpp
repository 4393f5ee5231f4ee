// decode_attention and attention_mass on the shim, against plain double precision.
#include "attention_problem.h"
#include "cuda_table.h"
#include "not_finite.h"

using namespace smartkv;

namespace {

const KernelTable CUDA = testing::cuda_table();
constexpr DType DTYPES[] = {DType::FLOAT32, DType::BFLOAT16, DType::FLOAT16};

void test_tiers() {
  int turn = 0;
  for (int head_dim : HEAD_DIMS) {
    for (int bits : TIERS) {
      const DType dtype = DTYPES[turn % 3];
      const int64_t window = turn % 4 == 0 ? 0 : turn % 4 == 1 ? 70 : 13;
      const int64_t sliding = turn % 3 == 1 ? 40 : 0;
      const Levels levels = turn % 2 ? Levels::GAUSSIAN : Levels::UNIFORM;
      const int64_t q_start = turn % 5 == 0 ? 60 : 140;  // 60: some records lie in the future
      const int64_t q_len = turn % 4 == 3 ? 3 : 1;
      const Case c{1, 1, 1 + turn % 8, head_dim, dtype, q_len, window, q_start, sliding};
      Problem problem(c, {bits}, {turn % 2 ? 63 : 130}, levels, 4, turn % (MAX_TURNS + 1));
      simt::set_seed(turn);
      check_decode(problem, CUDA, 1, turn % 2 == 0, Precision::FLOAT32);
      check_decode(problem, CUDA, 1, false, Precision::AUTO);
      ++turn;
    }
  }
}

void test_mixed_tiers() {
  int seed = 0;
  for (DType dtype : DTYPES) {
    for (int64_t q_len : {1, 5, 40}) {
      const Case c{2, 2, 3, 64, dtype, q_len, 75, 150, seed % 2 == 0 ? 64 : 0};
      Problem problem(c, {std::begin(TIERS), std::end(TIERS)}, {0, 1, 63, 64, 65, 130},
                      Levels::GAUSSIAN, 4, seed);
      simt::set_seed(seed++);
      check_decode(problem, CUDA, 1, true, Precision::FLOAT32);
      if (q_len < 40) check_decode(problem, CUDA, 1, false, Precision::AUTO);
    }
  }
  Problem empty({1, 2, 2, 64, DType::BFLOAT16, 3, 0, 5, 0}, {4}, {0}, Levels::GAUSSIAN);
  Problem dense({1, 1, 4, 96, DType::FLOAT16, 7, 200, 90, 0}, {}, {0}, Levels::GAUSSIAN);
  check_decode(empty, CUDA, 1, true);
  check_decode(dense, CUDA, 1, true);
}

}  // namespace

int main() {
  test_tiers();
  test_mixed_tiers();
  check_steps(CUDA);
  check_attention_mass(CUDA);
  check_not_finite(CUDA, Precision::FLOAT32);
  check_not_finite(CUDA, Precision::AUTO);
  return testing::report("test_simt_attention");
}
