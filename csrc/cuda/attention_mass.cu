// The probabilities that each key received: the second walk of decode_attention over the keys, and
// attention_mass, which is the same over a dense cache without V. No atomics: one warp owns a key.
#include "attention_block.h"
#include "cuda_ops.h"

namespace smartkv {
namespace {

// Kernels

// Log-sum-exp of this thread's rows, in powers of two.
template <int ROW_TILES>
struct ThreadLse {
  float at[ROW_TILES][2];
  bool counts[ROW_TILES][2];  // false where the row saw nothing, or its query is not finite

  template <typename Layout>
  __device__ __forceinline__ void load(const Block<Layout, ROW_TILES>& block) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = block.unit.row_block * Layout::ROWS + 8 * n + 2 * (threadIdx.x % 4) + e;
        const bool exists = is_within(row, block.run.num_rows);
        const float lse =
            exists ? block.run.p.lse[output_row(block.run.p, block.unit.head, row)] : -INFINITY;
        counts[n][e] = lse > -INFINITY;
        at[n][e] = lse * LOG2_E;
      }
    }
  }

  // Adds what the tokens 2g and 2g + 1 of a tile received to out[0], ..., out[count - 1].
  __device__ __forceinline__ void add(const float (&scores)[ROW_TILES][4], float* out,
                                      int64_t count) const {
    float mass[2] = {};
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float p = exp2f(scores[n][i] - at[n][i % 2]);
        mass[i / 2] += counts[n][i % 2] ? p : 0.0f;
      }
    }
    const int first =
        static_cast<int>(threadIdx.x) / WARP * WARP_TOKENS + threadIdx.x % WARP / 4 * 2;
#pragma unroll
    for (int token = 0; token < 2; ++token) {
      const float sum = sum_lanes<4>(mass[token]);
      if (threadIdx.x % 4 == 0 && is_within(int64_t{first} + token, count))
        out[first + token] += sum;
    }
  }
};

template <int HEAD_DIM, bool IS_FLOAT32, typename Layout, int ROW_TILES>
__device__ __forceinline__ void add_dense_mass(const Block<Layout, ROW_TILES>& block,
                                               const ThreadLse<ROW_TILES>& lse, const Tiles& tiles,
                                               float* mass, int64_t length) {
  const auto walk = [&]<DType DTYPE>() {
    walk_dense<HEAD_DIM, DTYPE>(
        block, tiles, false,
        [&](const DenseRows& rows, int first, int64_t tile, const int (&positions)[2], unsigned) {
          float scores[ROW_TILES][4];
          block.template score_dense<HEAD_DIM, DTYPE>(block.stages(), rows, first, positions,
                                                      scores);
          lse.add(scores, mass + tile * PAGE_SIZE, length - tile * PAGE_SIZE);
        });
  };
  if constexpr (IS_FLOAT32) {
    walk.template operator()<DType::FLOAT32>();
  } else if (block.run.p.q.dtype == DType::BFLOAT16) {
    walk.template operator()<DType::BFLOAT16>();
  } else {
    walk.template operator()<DType::FLOAT16>();
  }
}

template <int HEAD_DIM, int TIER, typename Layout, int ROW_TILES>
__device__ __forceinline__ void add_code_mass(const Block<Layout, ROW_TILES>& block,
                                              const ThreadLse<ROW_TILES>& lse, const Tiles& tiles,
                                              float* mass, int64_t length) {
  const LevelBytes levels = block.run.k_levels[tiles.tier];
  walk_codes<HEAD_DIM, TIER>(
      block, tiles, false,
      [&](const unsigned char* stage, int64_t tile, const int (&positions)[2]) {
        float scores[ROW_TILES][4];
        block.template score_codes<HEAD_DIM, TIER>(stage, levels, positions, scores);
        lse.add(scores, mass + tile * PAGE_SIZE, length - tile * PAGE_SIZE);
      });
}

// Parts of equal cost, cut without regard to row blocks: a part adds all rows of a head to its
// keys, one row block after the other. grid_shape: [num_parts].
template <int HEAD_DIM, int ROW_TILES, bool IS_FLOAT32>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2) attention_mass_kernel(AttentionRun run) {
  using Layout = BlockLayout<HEAD_DIM, ROW_TILES, IS_FLOAT32>;
  SMARTKV_DYNAMIC_SHARED(shared, unsigned char);
  const DecodeAttentionParams& p = run.p;
  const int64_t total = run.cost_before[run.heads];
  const int64_t begin = total * blockIdx.x / gridDim.x;
  const int64_t end = total * (blockIdx.x + int64_t{1}) / gridDim.x;
  Block<Layout, ROW_TILES> block{shared, run, {}, {}, {}};
  for (int64_t at = begin; at < end;) {
    const int64_t head = unit_at(run, at * run.row_blocks).head;
    const int64_t first = run.cost_before[head], next = run.cost_before[head + 1];
    for (int row_block = 0; row_block < run.row_blocks; ++row_block) {
      block.template open<HEAD_DIM>(unit_of_head(run, head, row_block));
      ThreadLse<ROW_TILES> lse;
      lse.load(block);
      for_each_tier(p, head, at - first, min(end, next) - first, [&](const Tiles& tiles, int kind) {
        const int64_t length = tier_length(p, head, tiles.tier);
        const bool is_window = tiles.tier == p.cache.num_tiers;
        float* const mass = is_window ? p.window_mass + head * p.window_len
                                      : p.mass + (head * p.cache.num_tiers + tiles.tier) *
                                                     p.cache.max_pages * PAGE_SIZE;
        SMARTKV_TIER_SWITCH(kind, [&] {
          if constexpr (TIER == 16) {
            add_dense_mass<HEAD_DIM, IS_FLOAT32>(block, lse, tiles, mass, length);
          } else {
            add_code_mass<HEAD_DIM, TIER>(block, lse, tiles, mass, length);
          }
        });
      });
      __syncthreads();  // before the next row block overwrites the queries
    }
    at = next;
  }
}

// Kernel launchers

template <int HEAD_DIM, int ROW_TILES, bool IS_FLOAT32>
void launch_parts(const AttentionRun& run, cudaStream_t stream) {
  constexpr int BYTES = BlockLayout<HEAD_DIM, ROW_TILES, IS_FLOAT32>::BYTES;
  const auto kernel = attention_mass_kernel<HEAD_DIM, ROW_TILES, IS_FLOAT32>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  SMARTKV_LAUNCH(kernel, static_cast<unsigned>(run.num_parts), ATTENTION_THREADS, BYTES, stream,
                 run);
}

// A dense cache whose keys are the window.
DecodeAttentionParams dense_params(const AttentionMassParams& m, float* lse) {
  DecodeAttentionParams p{};
  p.cache.batch = m.batch;
  p.cache.num_kv_heads = m.num_kv_heads;
  p.cache.head_dim = m.head_dim;
  p.q = m.q;
  p.k_window = m.k;
  p.window_positions = m.k_positions;
  p.window_mass = m.mass;
  p.lse = lse;
  p.num_heads = m.num_heads;
  p.q_len = m.q_len;
  p.window_len = m.kv_len;
  p.q_start = m.q_start;
  p.softmax_scale = m.softmax_scale;
  p.sliding_window = m.sliding_window;
  return p;
}

size_t lse_bytes(const AttentionMassParams& m) {
  const int64_t rows = int64_t{m.batch} * m.num_heads * m.q_len;
  return m.lse == nullptr ? (rows * sizeof(float) + 15) / 16 * 16 : 0;
}

}  // namespace

void launch_mass(const AttentionRun& run, cudaStream_t stream) {
  SMARTKV_HEAD_DIM_SWITCH(run.p.cache.head_dim, [&] {
    if (run.p.q.dtype == DType::FLOAT32) {
      launch_parts<HEAD_DIM, 1, true>(run, stream);
    } else if constexpr (has_two_row_tiles(HEAD_DIM)) {
      run.rows_per_block == 8 ? launch_parts<HEAD_DIM, 1, false>(run, stream)
                              : launch_parts<HEAD_DIM, 2, false>(run, stream);
    } else {
      launch_parts<HEAD_DIM, 1, false>(run, stream);
    }
  });
}

size_t attention_mass_workspace(const AttentionMassParams& m) {
  return lse_bytes(m) + attention_workspace(dense_params(m, nullptr));
}

const char* attention_mass_cuda(const AttentionMassParams& m, void* workspace, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  float* const lse = m.lse == nullptr ? static_cast<float*>(workspace) : const_cast<float*>(m.lse);
  const AttentionRun run =
      make_run(dense_params(m, lse), static_cast<unsigned char*>(workspace) + lse_bytes(m));
  launch_prepare(run, cuda_stream);
  if (m.lse == nullptr) launch_attention(run, cuda_stream);
  launch_mass(run, cuda_stream);
  return launch_error();
}

}  // namespace smartkv
