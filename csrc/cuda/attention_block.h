// The part of a unit that one block of threads attends to: its queries and the softmax state of its
// rows in shared memory, and the scores of a quarter of a tile by one warp.
#pragma once

#include "dense_tile.h"
#include "row_state.h"

namespace smartkv {

// Byte offsets in dynamic shared memory.
template <int HEAD_DIM, int ROW_TILES, bool IS_FLOAT32>
struct BlockLayout {
  static constexpr int ROWS = 8 * ROW_TILES;
  static constexpr int TERMS = IS_FLOAT32 ? MAX_TERMS : 1;
  static constexpr int Q_ROW = HEAD_DIM + 16;  // elements; padded against bank conflicts
  static constexpr int OUT = 0;
  static constexpr int MAX = OUT + ROWS * HEAD_DIM * 4;
  static constexpr int SUM = MAX + ROWS * 4;
  static constexpr int WARP_MAX = SUM + ROWS * 4;
  static constexpr int WARP_SUM = WARP_MAX + ATTENTION_WARPS * ROWS * 4;
  static constexpr int ROTATED = WARP_SUM + ATTENTION_WARPS * ROWS * 4;  // two terms
  static constexpr int PLAIN = ROTATED + 2 * ROWS * Q_ROW * 2;
  static constexpr int TURNS = PLAIN + TERMS * ROWS * Q_ROW * 2;  // q . U and q . V of each turn
  static constexpr int STEPS = TURNS + 2 * MAX_TURNS * ROWS * 4;
  static constexpr int STAGES = STEPS + MAX_TURNS * 4;
  // Of a warp: two quarters of a page of 8 bits, or one of a dense tile.
  static constexpr int STAGE_BYTES = constexpr_max(
      2 * CodeTile<HEAD_DIM, 8>::STAGE_BYTES,
      DenseTile<HEAD_DIM, IS_FLOAT32 ? DType::FLOAT32 : DType::BFLOAT16>::STAGE_BYTES);
  static constexpr int BYTES = STAGES + ATTENTION_WARPS * STAGE_BYTES;
  static_assert(STAGES % 16 == 0 && STAGE_BYTES % 16 == 0);
};

// What a thread needs of its rows 8n + 2t and 8n + 2t + 1.
template <int ROW_TILES>
struct ThreadRows {
  float scale[ROW_TILES][2], bias[ROW_TILES][2];
  Span span[ROW_TILES][2];
};

template <typename Layout, int ROW_TILES>
struct Block {
  unsigned char* shared;
  const AttentionRun& run;
  Unit unit;
  Span visible;  // by any row
  ThreadRows<ROW_TILES> rows;

  __device__ __forceinline__ float* floats(int offset) const {
    return reinterpret_cast<float*>(shared + offset);
  }
  __device__ __forceinline__ unsigned char* stages() const {
    return shared + Layout::STAGES + threadIdx.x / WARP * Layout::STAGE_BYTES;
  }

  // Operand B of the keys: row 8n + g, four channels from `channel`.
  __device__ __forceinline__ uint2 query(int section, int term, int n, int channel) const {
    const int row = term * Layout::ROWS + 8 * n + threadIdx.x % WARP / 4;
    return *reinterpret_cast<const uint2*>(shared + section + (row * Layout::Q_ROW + channel) * 2);
  }

  // Whole block. Ends with a barrier.
  template <int HEAD_DIM>
  __device__ __forceinline__ void open(const Unit& next) {
    unit = next;
    visible = span_of_block(run, unit.row_block);
    const int64_t first = unit.index * Layout::ROWS;
    const auto load = [&](int section, const uint16_t* from, int terms) {
      constexpr int CHUNKS = HEAD_DIM / 8;
      for (int i = threadIdx.x; i < Layout::ROWS * terms * CHUNKS; i += ATTENTION_THREADS) {
        const int row = i / CHUNKS / terms, term = i / CHUNKS % terms, chunk = i % CHUNKS;
        auto* const to =
            shared + section + ((term * Layout::ROWS + row) * Layout::Q_ROW + chunk * 8) * 2;
        *reinterpret_cast<uint4*>(to) = reinterpret_cast<const uint4*>(
            from + (first * terms + row * terms + term) * HEAD_DIM)[chunk];
      }
    };
    load(Layout::ROTATED, run.rotated, 2);
    load(Layout::PLAIN, run.plain, Layout::TERMS);
    for (int i = threadIdx.x; i < Layout::ROWS * HEAD_DIM; i += ATTENTION_THREADS) {
      floats(Layout::OUT)[i] = 0;
    }
    open_turns();
    if (threadIdx.x < Layout::ROWS) {
      floats(Layout::MAX)[threadIdx.x] = -INFINITY;
      floats(Layout::SUM)[threadIdx.x] = 0;
    }
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = 8 * n + 2 * (threadIdx.x % 4) + e;
        rows.scale[n][e] = run.row_scale[first + row];
        rows.bias[n][e] = run.row_bias[first + row];
        rows.span[n][e] = span_of_row(run, unit.row_block * Layout::ROWS + row);
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ int32_t* steps() const {
    return reinterpret_cast<int32_t*>(shared + Layout::STEPS);
  }

  __device__ __forceinline__ void open_turns() {
    const Turns& turns = run.p.cache.turns;
    const int count = 2 * turns.count * Layout::ROWS;
    for (int i = threadIdx.x; i < count; i += ATTENTION_THREADS) {
      floats(Layout::TURNS)[i] = run.row_turns[unit.index * count + i];
    }
    if (is_within(static_cast<int>(threadIdx.x), turns.count)) {
      steps()[threadIdx.x] = turns.steps[unit.head * turns.count + threadIdx.x];
    }
  }

  // What turns of the keys 2g and 2g + 1. Of the four lanes that have them, lane t has the waves of
  // every fourth turn.
  __device__ __forceinline__ void add_turns(const int (&positions)[2],
                                            float (&scores)[ROW_TILES][4]) const {
    constexpr int LANES = 4;
    const int t = threadIdx.x % LANES, count = run.p.cache.turns.count;
    for (int first = 0; first < count; first += LANES) {
      const int step = steps()[min(first + t, count - 1)];
      const SinCos mine[2] = {sin_cos<false>(positions[0], step),
                              sin_cos<false>(positions[1], step)};
      for (int i = first; i < min(first + LANES, count); ++i) {
        float sin[2], cos[2];
#pragma unroll
        for (int token = 0; token < 2; ++token) {
          sin[token] = __shfl_sync(ALL_LANES, mine[token].sin, i - first, LANES);
          cos[token] = __shfl_sync(ALL_LANES, mine[token].cos, i - first, LANES);
        }
        const float* const dots = floats(Layout::TURNS) + 2 * i * Layout::ROWS + 2 * t;
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float* const dot = dots + 8 * n + k % 2;
            scores[n][k] = fmaf(cos[k / 2], dot[0], scores[n][k]);
            scores[n][k] = fmaf(sin[k / 2], dot[Layout::ROWS], scores[n][k]);
          }
        }
      }
    }
  }

  // -inf where a row does not see the token.
  __device__ __forceinline__ void mask(float (&scores)[ROW_TILES][4],
                                       const int (&positions)[2]) const {
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (!sees(rows.span[n][i % 2], positions[i / 2])) scores[n][i] = -INFINITY;
      }
    }
  }

  // Scores of a quarter of a page: tokens 2g, 2g + 1 by this thread's rows.
  template <int HEAD_DIM, int TIER>
  __device__ __forceinline__ void score_codes(const unsigned char* stage, const LevelBytes& levels,
                                              const int (&positions)[2],
                                              float (&scores)[ROW_TILES][4]) const {
    using Tile = CodeTile<HEAD_DIM, TIER>;
    using Codes = typename Tile::KCodes;
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = 0;
    }
    const int t = threadIdx.x % 4;
#pragma unroll
    for (int block = 0; block < Codes::BLOCKS; ++block) {
      Fragment keys[Codes::SHIFTS];
      Tile::k_matrices(stage, block, levels, keys);
      const int lane = block * LANES_PER_MATRIX + 4 * t;
      const bool exists = Codes::LANES % LANES_PER_MATRIX == 0 || is_within(lane, Codes::LANES);
#pragma unroll
      for (int u = 0; u < Codes::SHIFTS; ++u) {
#pragma unroll
        for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
          for (int term = 0; term < 2; ++term) {
            if (term == 1 && !run.precise) break;
            uint2 q = make_uint2(0, 0);
            if (exists) q = query(Layout::ROTATED, term, n, lane + Codes::LANES * u);
            const unsigned b[2] = {q.x, q.y};
            multiply_fp16(scores[n], keys[u].at, b);
          }
        }
      }
    }
    const int g = threadIdx.x % WARP / 4;
    const float2 k_scale =
        __half22float2(*reinterpret_cast<const __half2*>(stage + Tile::K_SCALE + 4 * g));
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float scale = rows.scale[n][i % 2] * (i < 2 ? k_scale.x : k_scale.y);
        scores[n][i] = fmaf(scores[n][i], scale, rows.bias[n][i % 2]);
      }
    }
    if (run.p.cache.turns.count > 0) add_turns(positions, scores);
    mask(scores, positions);
  }

  template <int HEAD_DIM, DType DTYPE>
  __device__ __forceinline__ void score_dense(const unsigned char* stage, const DenseRows& dense,
                                              int first, const int (&positions)[2],
                                              float (&scores)[ROW_TILES][4]) const {
    using Tile = DenseTile<HEAD_DIM, DTYPE>;
    const bool valid[2] = {sees(visible, positions[0]), sees(visible, positions[1])};
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] = 0;
    }
#pragma unroll
    for (int block = 0; block < Tile::MATRICES; ++block) {
      Fragment keys[Tile::TERMS];
      Tile::k_matrix(stage, dense, first, valid, block, keys);
#pragma unroll
      for (int n = 0; n < ROW_TILES; ++n) {
        unsigned b[Tile::TERMS][2];
#pragma unroll
        for (int term = 0; term < Tile::TERMS; ++term) {
          const uint2 q = query(Layout::PLAIN, term, n, block * 16 + 4 * (threadIdx.x % 4));
          b[term][0] = q.x;
          b[term][1] = q.y;
        }
        Tile::multiply(scores[n], keys, b);
      }
    }
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[n][i] *= run.p.softmax_scale * LOG2_E;
    }
    mask(scores, positions);
  }

  // Rows of a tile of the window or of a page of 16 bits.
  template <int HEAD_DIM>
  __device__ __forceinline__ DenseRows dense_rows(int tier, int64_t tile) const {
    const DecodeAttentionParams& p = run.p;
    const PagedKV& cache = p.cache;
    const int64_t first = tile * PAGE_SIZE;
    const int count =
        static_cast<int>(min(tier_length(p, unit.head, tier) - first, int64_t{PAGE_SIZE}));
    if (tier < cache.num_tiers) {
      const PageLayout layout = page_layout(16, HEAD_DIM, dtype_size(cache.raw_dtype));
      const char* const page =
          reinterpret_cast<const char*>(page_of(cache, unit.head, tier, first));
      const int64_t stride = int64_t{HEAD_DIM} * layout.itemsize;
      return {page + layout.k_codes,
              page + layout.v_codes,
              stride,
              stride,
              reinterpret_cast<const int32_t*>(page + layout.position),
              count,
              true};
    }
    const int64_t b = unit.head / cache.num_kv_heads, h = unit.head % cache.num_kv_heads;
    const int64_t size = dtype_size(p.k_window.dtype);
    const char* const v = p.v_window.data == nullptr ? nullptr : row_of(p.v_window, b, h, first);
    return {row_of(p.k_window, b, h, first),
            v,
            p.k_window.stride_n * size,
            p.v_window.stride_n * size,
            p.window_positions + b * p.window_len + first,
            count,
            run.copies_window};
  }
};

// Tiles [begin, end) of one tier.
struct Tiles {
  int tier;
  int64_t begin, end;
};

// Calls visit(tiles, kind) for the tiers, kind one of TIERS, of a head that lie in [low, high) of
// its costs.
template <typename Visit>
__device__ __forceinline__ void for_each_tier(const DecodeAttentionParams& p, int64_t head,
                                              int64_t low, int64_t high, const Visit& visit) {
  int64_t before = 0;
  for (int tier = 0; tier <= p.cache.num_tiers; ++tier) {
    const int64_t cost = tile_cost(p, tier), count = tier_tiles(p, head, tier);
    const auto tile_from = [&](int64_t x) {
      return x <= before ? 0 : min((x - before + cost - 1) / cost, count);
    };
    const Tiles tiles{tier, tile_from(low), tile_from(high)};
    before += cost * count;
    if (tiles.begin < tiles.end) {
      visit(tiles, tier < p.cache.num_tiers ? p.cache.tier_bits[tier] : 16);
    }
  }
}

// Calls visit(stage, tile, positions of the tokens 2g and 2g + 1) for this warp's quarter of each
// tile, with several tiles on their way. Positions are -1 where the list has no record.
template <int HEAD_DIM, int TIER, typename Layout, int ROW_TILES, typename Visit>
__device__ __forceinline__ void walk_codes(const Block<Layout, ROW_TILES>& block,
                                           const Tiles& tiles, bool with_v, const Visit& visit) {
  using Tile = CodeTile<HEAD_DIM, TIER>;
  constexpr int FITTING = Layout::STAGE_BYTES / Tile::STAGE_BYTES;
  constexpr int STAGES = FITTING < MAX_STAGES ? FITTING : MAX_STAGES;
  static_assert(STAGES >= 2);
  const AttentionRun& run = block.run;
  const int warp = threadIdx.x / WARP, g = threadIdx.x % WARP / 4;
  const int64_t length = tier_length(run.p, block.unit.head, tiles.tier);
  const auto stage_of = [&](int64_t tile) {
    return block.stages() + (tile - tiles.begin) % STAGES * Tile::STAGE_BYTES;
  };
  const auto load = [&](int64_t tile) {
    if (tile < tiles.end) {
      Tile::load(stage_of(tile),
                 page_of(run.p.cache, block.unit.head, tiles.tier, tile * PAGE_SIZE), warp, with_v);
    }
    commit_copies();
  };
  for (int i = 0; i < STAGES - 1; ++i) load(tiles.begin + i);
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    wait_copies<STAGES - 2>();
    __syncwarp();  // the tile has come for all lanes, and none still reads the one before it
    load(tile + STAGES - 1);
    const unsigned char* const stage = stage_of(tile);
    const int64_t first = tile * PAGE_SIZE + warp * WARP_TOKENS + 2 * g;
    const int2 stored = *reinterpret_cast<const int2*>(stage + Tile::POSITION + 8 * g);
    const int positions[2] = {is_within(first, length) ? stored.x : -1,
                              is_within(first + 1, length) ? stored.y : -1};
    visit(stage, tile, positions);
  }
  __syncwarp();  // the stages are free
}

// The same for tiles of the window and pages of 16 bits: visit(rows, first token, tile, positions,
// mask of the tokens that some row sees). Quarters that no row sees are left out.
template <int HEAD_DIM, DType DTYPE, typename Layout, int ROW_TILES, typename Visit>
__device__ __forceinline__ void walk_dense(const Block<Layout, ROW_TILES>& block,
                                           const Tiles& tiles, bool with_v, const Visit& visit) {
  const int lane = threadIdx.x % WARP, g = lane / 4;
  const int first = static_cast<int>(threadIdx.x) / WARP * WARP_TOKENS;
  for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
    const DenseRows rows = block.template dense_rows<HEAD_DIM>(tiles.tier, tile);
    const int token = first + lane % WARP_TOKENS;
    int position = is_within(token, rows.count) ? rows.positions[token] : -1;
    if (!sees(block.visible, position)) position = -1;
    const unsigned valid = __ballot_sync(ALL_LANES, position >= 0) & ((1u << WARP_TOKENS) - 1);
    if (valid == 0) continue;
    DenseTile<HEAD_DIM, DTYPE>::load(block.stages(), rows, first, position, with_v);
    commit_copies();
    wait_copies<0>();
    __syncwarp();  // the stage has come for all lanes
    const int positions[2] = {__shfl_sync(ALL_LANES, position, 2 * g),
                              __shfl_sync(ALL_LANES, position, 2 * g + 1)};
    visit(rows, first, tile, positions, valid);
    __syncwarp();  // the stage has been read
  }
}

}  // namespace smartkv
