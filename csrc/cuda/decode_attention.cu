// decode_attention on CUDA: queries meet packed pages on the tensor cores.
//
// Blocks take equal parts of the work list. In a block each of four warps has its own 16 tokens of
// every tile, its own stages of cp.async and its own softmax state: no barrier of the block but
// where a part changes its tier. Per-token scales multiply scores and weights, never values.
#include <algorithm>

#include "attention_block.h"
#include "cuda_ops.h"

namespace smartkv {
namespace {

// Kernels

// Adds what the warps found to the state of the block. channel_of(matrix, row of 16): -1 for none.
template <int HEAD_DIM, typename Layout, int ROW_TILES, int MATRICES, typename ChannelOf>
__device__ __forceinline__ void merge_warps(Block<Layout, ROW_TILES>& block,
                                            RowState<ROW_TILES>& state,
                                            const float (&o)[MATRICES][ROW_TILES][4],
                                            const ChannelOf& channel_of) {
  constexpr int ROWS = Layout::ROWS;
  const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
  float* const warp_max = block.floats(Layout::WARP_MAX);
  float* const warp_sum = block.floats(Layout::WARP_SUM);
  float* const row_max = block.floats(Layout::MAX);
  float* const row_sum = block.floats(Layout::SUM);
  float* const out = block.floats(Layout::OUT);
#pragma unroll
  for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int mask = 4; mask < WARP; mask *= 2) {
        state.sum[n][e] += __shfl_xor_sync(ALL_LANES, state.sum[n][e], mask);
      }
      if (g == 0) {
        warp_max[warp * ROWS + 8 * n + 2 * t + e] = state.max[n][e];
        warp_sum[warp * ROWS + 8 * n + 2 * t + e] = state.sum[n][e];
      }
    }
  }
  __syncthreads();
  const auto new_max = [&](int row) {
    float top = row_max[row];
    for (int w = 0; w < ATTENTION_WARPS; ++w) top = fmaxf(top, warp_max[w * ROWS + row]);
    return top == -INFINITY ? 0.0f : top;
  };
  for (int i = threadIdx.x; i < ROWS * HEAD_DIM; i += ATTENTION_THREADS) {
    out[i] *= exp2f(row_max[i / HEAD_DIM] - new_max(i / HEAD_DIM));
  }
  float factor[ROW_TILES][2];
#pragma unroll
  for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      factor[n][e] = exp2f(state.max[n][e] - new_max(8 * n + 2 * t + e)) * state.unit();
    }
  }
  for (int turn = 0; turn < ATTENTION_WARPS; ++turn) {  // in order: sums do not depend on chance
    __syncthreads();
    if (turn != warp || block.run.p.out == nullptr) continue;
#pragma unroll
    for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
      for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int channel = channel_of(m, i / 2);
          if (channel < 0) continue;
          out[(8 * n + 2 * t + i % 2) * HEAD_DIM + channel] += o[m][n][i] * factor[n][i % 2];
        }
      }
    }
  }
  if (threadIdx.x < ROWS) {
    const int row = threadIdx.x;
    const float base = new_max(row);
    float sum = row_sum[row] * exp2f(row_max[row] - base);
    for (int w = 0; w < ATTENTION_WARPS; ++w) {
      sum += warp_sum[w * ROWS + row] * exp2f(warp_max[w * ROWS + row] - base);
    }
    float top = row_max[row];
    for (int w = 0; w < ATTENTION_WARPS; ++w) top = fmaxf(top, warp_max[w * ROWS + row]);
    row_max[row] = top;
    row_sum[row] = sum;
  }
  __syncthreads();
}

template <int MATRICES, int ROW_TILES>
__device__ __forceinline__ void shrink_output(float (&o)[MATRICES][ROW_TILES][4],
                                              const float (&shrink)[ROW_TILES][2]) {
  bool changes = false;
#pragma unroll
  for (int n = 0; n < ROW_TILES; ++n) changes |= shrink[n][0] != 1 || shrink[n][1] != 1;
  if (!__any_sync(ALL_LANES, changes)) return;
#pragma unroll
  for (int m = 0; m < MATRICES; ++m) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o[m][n][i] *= shrink[n][i % 2];
    }
  }
}

template <int HEAD_DIM, int TIER, typename Layout, int ROW_TILES>
__device__ __forceinline__ void attend_codes(Block<Layout, ROW_TILES>& block, const Tiles& tiles) {
  using Tile = CodeTile<HEAD_DIM, TIER>;
  using Codes = typename Tile::VCodes;
  const bool precise = block.run.precise, with_v = block.run.p.out != nullptr;
  const LevelBytes k_levels = block.run.k_levels[tiles.tier];
  const LevelBytes v_levels = Tile::IS_EVEN ? k_levels : block.run.v_levels[tiles.tier];
  const int g = threadIdx.x % WARP / 4;
  RowState<ROW_TILES> state;
  state.clear();
  float o[Codes::MATRICES][ROW_TILES][4] = {};
  walk_codes<HEAD_DIM, TIER>(
      block, tiles, with_v, [&](const unsigned char* stage, int64_t, const int (&positions)[2]) {
        float scores[ROW_TILES][4];
        block.template score_codes<HEAD_DIM, TIER>(stage, k_levels, positions, scores);
        float v_scale[2] = {1, 1};
        if (with_v) {
          const auto* const stored = reinterpret_cast<const __half2*>(stage + Tile::V_SCALE);
          const float2 scales = __half22float2(stored[g]);
          v_scale[0] = sees(block.visible, positions[0]) ? scales.x : 0.0f;
          v_scale[1] = sees(block.visible, positions[1]) ? scales.y : 0.0f;
        }
        unsigned weights[ROW_TILES][2][2];
        float shrink[ROW_TILES][2];
        if (!weigh<DType::FLOAT16>(state, scores, v_scale, weights, shrink, precise ? 2 : 1))
          return;
        if (!with_v) return;
        shrink_output(o, shrink);
#pragma unroll
        for (int lanes = 0; lanes < Codes::BLOCKS; ++lanes) {
          Fragment values[Codes::SHIFTS];
          Tile::v_matrices(stage, lanes, v_levels, values);
#pragma unroll
          for (int u = 0; u < Codes::SHIFTS; ++u) {
#pragma unroll
            for (int n = 0; n < ROW_TILES; ++n) {
              float (&sum)[4] = o[lanes * Codes::SHIFTS + u][n];
              multiply_fp16(sum, values[u].at, weights[n][0]);
              if (precise) multiply_fp16(sum, values[u].at, weights[n][1]);
            }
          }
        }
      });
  merge_warps<HEAD_DIM>(block, state, o, [&](int matrix, int row) {
    const int lane = matrix / Codes::SHIFTS * LANES_PER_MATRIX + 2 * g + row;
    return is_within(lane, Codes::LANES) ? lane + Codes::LANES * (matrix % Codes::SHIFTS) : -1;
  });
}

template <int HEAD_DIM, DType DTYPE, typename Layout, int ROW_TILES>
__device__ __forceinline__ void attend_dense(Block<Layout, ROW_TILES>& block, const Tiles& tiles) {
  using Tile = DenseTile<HEAD_DIM, DTYPE>;
  const bool with_v = block.run.p.out != nullptr;
  const int g = threadIdx.x % WARP / 4;
  RowState<ROW_TILES> state;
  state.clear();
  float o[Tile::MATRICES][ROW_TILES][4] = {};
  walk_dense<HEAD_DIM, DTYPE>(
      block, tiles, with_v,
      [&](const DenseRows& rows, int first, int64_t, const int (&positions)[2], unsigned valid) {
        float scores[ROW_TILES][4];
        block.template score_dense<HEAD_DIM, DTYPE>(block.stages(), rows, first, positions, scores);
        const float v_scale[2] = {positions[0] >= 0 ? 1.0f : 0.0f, positions[1] >= 0 ? 1.0f : 0.0f};
        unsigned weights[ROW_TILES][Tile::TERMS][2];
        float shrink[ROW_TILES][2];
        constexpr DType OPERAND = DTYPE == DType::FLOAT16 ? DType::FLOAT16 : DType::BFLOAT16;
        if (!weigh<OPERAND>(state, scores, v_scale, weights, shrink, Tile::TERMS)) return;
        if (!with_v) return;
        shrink_output(o, shrink);
#pragma unroll
        for (int m = 0; m < Tile::MATRICES; ++m) {
          Fragment values[Tile::TERMS];
          Tile::v_matrix(block.stages(), rows, first, valid, m, values);
#pragma unroll
          for (int n = 0; n < ROW_TILES; ++n) Tile::multiply(o[m][n], values, weights[n]);
        }
      });
  merge_warps<HEAD_DIM>(block, state, o,
                        [&](int matrix, int row) { return matrix * 16 + g + 8 * row; });
}

// The sums over quantised values are in rotated space. Whole block, between barriers.
template <int HEAD_DIM, typename Layout, int ROW_TILES>
__device__ __forceinline__ void rotate_back(const Block<Layout, ROW_TILES>& block) {
  float* const out = block.floats(Layout::OUT);
  const int lane = threadIdx.x % HALF_WARP;
#pragma unroll
  for (int n = 0; n < ROW_TILES; ++n) {
    float* const row = out + (8 * n + threadIdx.x / HALF_WARP) * HEAD_DIM;
    HeadRow<HEAD_DIM> x;
#pragma unroll
    for (int r = 0; r < HEAD_DIM / HALF_WARP; ++r) x.at[r] = row[lane + HALF_WARP * r];
    rotate(x, true);
#pragma unroll
    for (int r = 0; r < HEAD_DIM / HALF_WARP; ++r) row[lane + HALF_WARP * r] = x.at[r];
  }
  __syncthreads();
}

// grid_shape: [num_parts].
template <int HEAD_DIM, int ROW_TILES, bool IS_FLOAT32>
__global__ void __launch_bounds__(ATTENTION_THREADS, 2) decode_attention_kernel(AttentionRun run) {
  using Layout = BlockLayout<HEAD_DIM, ROW_TILES, IS_FLOAT32>;
  SMARTKV_DYNAMIC_SHARED(shared, unsigned char);
  const DecodeAttentionParams& p = run.p;
  Block<Layout, ROW_TILES> block{shared, run, {}, {}, {}};
  const int64_t end = part_begin(run, int64_t{blockIdx.x} + 1);
  for (int64_t at = part_begin(run, blockIdx.x); at < end;) {
    block.template open<HEAD_DIM>(unit_at(run, at));
    const Unit& unit = block.unit;
    const int64_t low = at - unit.begin, high = min(end - unit.begin, unit.cost);
    at = unit.begin + unit.cost;
    bool is_rotated = false;
    for_each_tier(p, unit.head, low, high, [&](const Tiles& tiles, int kind) SMARTKV_FORCED {
      if (kind == 16 && is_rotated) rotate_back<HEAD_DIM>(block);
      is_rotated = kind != 16;
      if (kind == 2) attend_codes<HEAD_DIM, 2>(block, tiles);
      if (kind == 302) attend_codes<HEAD_DIM, 302>(block, tiles);
      if (kind == 3) attend_codes<HEAD_DIM, 3>(block, tiles);
      if (kind == 403) attend_codes<HEAD_DIM, 403>(block, tiles);
      if (kind == 4) attend_codes<HEAD_DIM, 4>(block, tiles);
      if (kind == 8) attend_codes<HEAD_DIM, 8>(block, tiles);
      if (kind != 16) return;
      if constexpr (IS_FLOAT32) {
        attend_dense<HEAD_DIM, DType::FLOAT32>(block, tiles);
      } else if (p.q.dtype == DType::BFLOAT16) {
        attend_dense<HEAD_DIM, DType::BFLOAT16>(block, tiles);
      } else {
        attend_dense<HEAD_DIM, DType::FLOAT16>(block, tiles);
      }
    });
    if (is_rotated) rotate_back<HEAD_DIM>(block);
    const int64_t part = (blockIdx.x + unit.index) * Layout::ROWS;
    if (p.out != nullptr) {
      for (int i = threadIdx.x; i < Layout::ROWS * HEAD_DIM; i += ATTENTION_THREADS) {
        run.part_o[part * HEAD_DIM + i] = block.floats(Layout::OUT)[i];
      }
    }
    if (threadIdx.x < Layout::ROWS) {
      run.part_max[part + threadIdx.x] = block.floats(Layout::MAX)[threadIdx.x];
      run.part_sum[part + threadIdx.x] = block.floats(Layout::SUM)[threadIdx.x];
    }
    // No barrier: what a thread read here, itself will overwrite for the next unit.
  }
}

// Calls visit(row of the partial results) for the parts that a unit was cut into, in order.
template <typename Visit>
__device__ __forceinline__ void for_each_part(const AttentionRun& run, const Unit& unit, int row,
                                              const Visit& visit) {
  if (unit.cost == 0) return;
  const int64_t total = run.cost_before[run.heads] * run.row_blocks;
  int64_t part = unit.begin * run.num_parts / total;
  while (part_begin(run, part + 1) <= unit.begin) ++part;
  for (; part < run.num_parts && part_begin(run, part) < unit.begin + unit.cost; ++part) {
    if (part_begin(run, part) == part_begin(run, part + 1)) continue;
    visit((part + unit.index) * run.rows_per_block + row);
  }
}

// A warp per row: out and lse from the parts. grid_shape: [units * rows_per_block / 4].
__global__ void __launch_bounds__(ATTENTION_THREADS, 8) merge_parts_kernel(AttentionRun run) {
  const DecodeAttentionParams& p = run.p;
  const int head_dim = p.cache.head_dim, lane = threadIdx.x % WARP;
  const int64_t at = int64_t{blockIdx.x} * ATTENTION_WARPS + threadIdx.x / WARP;
  if (!is_within(at, run.units * run.rows_per_block)) return;
  const int64_t index = at / run.rows_per_block;
  const Unit unit =
      unit_of_head(run, index / run.row_blocks, static_cast<int>(index % run.row_blocks));
  const int local = static_cast<int>(at % run.rows_per_block);
  const int row = unit.row_block * run.rows_per_block + local;
  if (!is_within(row, run.num_rows)) return;
  float top = -INFINITY;
  for_each_part(run, unit, local, [&](int64_t i) { top = fmaxf(top, run.part_max[i]); });
  const float base = top == -INFINITY ? 0.0f : top;
  float sum = run.poison[at];
  for_each_part(run, unit, local,
                [&](int64_t i) { sum += run.part_sum[i] * exp2f(run.part_max[i] - base); });
  const int64_t to = output_row(p, unit.head, row);
  // A row that saw nothing gives 0 and -inf, one of a query that is not finite NaN.
  if (lane == 0) p.lse[to] = sum > 0 ? (base + log2f(sum)) * LN_2 : sum - INFINITY;
  if (p.out == nullptr) return;
  const float inverse = sum > 0 ? 1 / sum : sum;
  for (int c = lane; c < head_dim; c += WARP) {
    float x = 0;
    for_each_part(run, unit, local, [&](int64_t i) {
      x = fmaf(run.part_o[i * head_dim + c], exp2f(run.part_max[i] - base), x);
    });
    store_value(p.out, p.q.dtype, to * head_dim + c, x * inverse);
  }
}

// Kernel launchers

template <int HEAD_DIM, int ROW_TILES, bool IS_FLOAT32>
void launch_parts(const AttentionRun& run, cudaStream_t stream) {
  constexpr int BYTES = BlockLayout<HEAD_DIM, ROW_TILES, IS_FLOAT32>::BYTES;
  const auto kernel = decode_attention_kernel<HEAD_DIM, ROW_TILES, IS_FLOAT32>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, BYTES);
  SMARTKV_LAUNCH(kernel, static_cast<unsigned>(run.num_parts), ATTENTION_THREADS, BYTES, stream,
                 run);
}

}  // namespace

void launch_attention(const AttentionRun& run, cudaStream_t stream) {
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
  const int64_t rows = run.units * run.rows_per_block;
  const auto grid = static_cast<unsigned>((rows + ATTENTION_WARPS - 1) / ATTENTION_WARPS);
  SMARTKV_LAUNCH(merge_parts_kernel, grid, ATTENTION_THREADS, 0, stream, run);
}

size_t decode_attention_workspace(const DecodeAttentionParams& p) { return attention_workspace(p); }

const char* decode_attention_cuda(const DecodeAttentionParams& p, void* workspace, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const AttentionRun run = make_run(p, workspace);
  launch_prepare(run, cuda_stream);
  launch_attention(run, cuda_stream);
  if (p.mass != nullptr || p.window_mass != nullptr) launch_mass(run, cuda_stream);
  return launch_error();
}

}  // namespace smartkv
