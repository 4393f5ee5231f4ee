// decode_attention and attention_mass against plain double precision.
#include "attention_plan.h"
#include "attention_problem.h"

using namespace smartkv;

namespace {

constexpr Precision PRECISIONS[] = {Precision::FLOAT32, Precision::INT16, Precision::INT8,
                                    Precision::AUTO};

void test_decode() {
  const DType dtypes[] = {DType::FLOAT32, DType::BFLOAT16, DType::FLOAT16};
  const int threads[] = {1, 2, 3, 7};
  int turn = 0;
  for (int head_dim : HEAD_DIMS) {
    for (int bits : BITS) {
      for (int64_t q_len : {1, 2, 3, 9}) {
        const DType dtype = dtypes[turn % 3];
        const int64_t window = turn % 4 == 0 ? 0 : turn % 4 == 1 ? 70 : 13;
        const int64_t sliding = turn % 3 == 1 ? 40 : 0;
        const Levels levels = turn % 2 ? Levels::GAUSSIAN : Levels::UNIFORM;
        const int64_t q_start = turn % 5 == 0 ? 60 : 140;  // 60: some records lie in the future
        const Case c{1, 2, 1 + turn % 4, head_dim, dtype, q_len, window, q_start, sliding};
        Problem problem(c, {bits}, {130, turn % 2 ? 63 : 64}, levels);
        for (const KernelTable* kernels : testing::all_kernels()) {
          for (Precision precision : PRECISIONS) {
            check_decode(problem, *kernels, threads[turn % 4], turn % 2 == 0, precision);
          }
        }
        ++turn;
      }
    }
  }
}

void test_mixed_tiers() {
  for (int threads : {1, 2, 3, 7}) {
    for (int64_t q_len : {1, 5, 40}) {
      const Case c{2, 2, 3, 128, DType::FLOAT32, q_len, 75, 150, threads == 2 ? 64 : 0};
      Problem problem(c, {2, 3, 4, 8, 16}, {0, 1, 63, 64, 65, 130}, Levels::GAUSSIAN);
      for (const KernelTable* kernels : testing::all_kernels()) {
        for (Precision precision : PRECISIONS) {
          check_decode(problem, *kernels, threads, true, precision);
        }
      }
    }
  }
  // Nothing at all to see, and no tiers.
  Problem empty({1, 2, 2, 64, DType::BFLOAT16, 3, 0, 5, 0}, {4}, {0}, Levels::GAUSSIAN);
  Problem dense({1, 1, 4, 96, DType::FLOAT16, 7, 200, 90, 0}, {}, {0}, Levels::GAUSSIAN);
  for (const KernelTable* kernels : testing::all_kernels()) {
    check_decode(empty, *kernels, 2, true);
    check_decode(dense, *kernels, 3, true);
  }
}

// Groups of five to eight query heads: one pass over the codes serves them all.
void test_wide_groups() {
  for (int groups : {5, 6, 7, 8}) {
    for (int bits : BITS) {
      const Case c{1, 2, groups, groups % 2 ? 64 : 128, DType::BFLOAT16, 1, 13, 140, 0};
      Problem problem(c, {bits}, {130, 63}, Levels::GAUSSIAN);
      for (const KernelTable* kernels : testing::all_kernels()) {
        for (Precision precision : PRECISIONS) {
          check_decode(problem, *kernels, 3, true, precision);
        }
      }
    }
  }
}

// What is fetched ahead is what will be read: the pages of a part in the order of its tiles.
void test_page_walk() {
  const Case c{2, 2, 3, 64, DType::FLOAT16, 1, 75, 150, 0};
  Problem problem(c, {2, 4, 16}, {0, 1, 64, 65, 130}, Levels::GAUSSIAN);
  const DecodeAttentionParams p = problem.params();
  for (int64_t parts : {1, 2, 3, 7, 40}) {
    const AttentionPlan plan(p, parts);
    for (int64_t part = 0; part < parts; ++part) {
      const Piece* begin = plan.pieces + plan.part_begin[part];
      const Piece* end = plan.pieces + plan.part_begin[part + 1];
      PageWalk walk(p, begin, end);
      for (const Piece* piece = begin; piece != end; ++piece) {
        for (int64_t i = piece->begin; i < piece->end; ++i) {
          const TileRef tile = tile_at(p, piece->head, i);
          if (tile.tier == p.cache.num_tiers) continue;
          const int64_t list = piece->head * p.cache.num_tiers + tile.tier;
          const int32_t page = p.cache.block_table[list * p.cache.max_pages + tile.index];
          const int64_t bytes = p.cache.page_bytes[tile.tier];
          const PageRef next = walk.next();
          CHECK(next.page == p.cache.pools[tile.tier] + page * bytes && next.bytes == bytes,
                "part %d of %d, tile %d: another page", static_cast<int>(part),
                static_cast<int>(parts), static_cast<int>(i));
        }
      }
      CHECK(walk.next().page == nullptr, "part %d of %d: too many pages", static_cast<int>(part),
            static_cast<int>(parts));
    }
  }
}

void test_steps_and_mass() {
  for (const KernelTable* kernels : testing::all_kernels()) {
    check_steps(*kernels);
    check_attention_mass(*kernels);
  }
}

}  // namespace

int main() {
  test_decode();
  test_mixed_tiers();
  test_wide_groups();
  test_page_walk();
  test_steps_and_mass();
  return testing::report("attention");
}
