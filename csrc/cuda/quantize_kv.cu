// quantize_kv and dequantize_kv on CUDA: whole pages, a block of eight warps per page.
#include <algorithm>

#include "cuda_ops.h"
#include "record_io.h"

namespace smartkv {
namespace {

constexpr int WARPS_PER_BLOCK = 8;
constexpr int THREADS = WARP * WARPS_PER_BLOCK;

// Blocks per multiprocessor that the registers have to suffice for: as many as spill none. Without
// a number the compiler prefers a few spills to fewer blocks.
constexpr int quantize_blocks(int head_dim, int tier) {
  const bool is_uneven = k_bits_of(tier) != v_bits_of(tier);
  return paley_order(head_dim) > 1 ? 2 : head_dim >= 128 || is_uneven ? 3 : 4;
}
constexpr int dequantize_blocks(int head_dim) {
  return paley_order(head_dim) > 1 || head_dim > 128 ? 1 : 2;
}

// Kernels

// Both pointers 16-byte aligned, bytes a multiple of 16.
__device__ __forceinline__ void copy_page(uint8_t* to, const uint8_t* from, int64_t bytes) {
  for (int64_t i = threadIdx.x; i < bytes / 16; i += THREADS) {
    reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
  }
}

// A warp per token, pages of fewer than 16 bits built in shared memory so that they leave in
// accesses of 16 bytes. grid_shape: [min(batch * num_kv_heads * num_pages, most_blocks())].
template <int HEAD_DIM, int TIER>
__global__ void __launch_bounds__(THREADS, quantize_blocks(HEAD_DIM, TIER))
    quantize_kv_kernel(QuantizeParams p, TierBooks codebooks, int64_t num_pages) {
  SMARTKV_SHARED(scratch, CodeScratch[WARPS_PER_BLOCK]);
  SMARTKV_SHARED(books, TierBooks);
  SMARTKV_DYNAMIC_SHARED(image, uint8_t);
  const PageLayout layout = page_layout(TIER, HEAD_DIM, dtype_size(p.k.dtype));
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  if (threadIdx.x == 0) books = codebooks;
  const int64_t items = int64_t{p.batch} * p.num_kv_heads * num_pages;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const int64_t head = item / num_pages, first = item % num_pages * PAGE_SIZE;
    const int64_t b = head / p.num_kv_heads, h = head % p.num_kv_heads;
    uint8_t* const out = p.pages + item * p.page_bytes;
    uint8_t* const page = TIER == 16 ? out : image;
    // No barrier: a thread clears what itself has copied out of the page before this one.
    if (TIER != 16 || first + PAGE_SIZE > p.kv_len) {
      for (int64_t i = threadIdx.x; i < p.page_bytes / 16; i += THREADS) {
        reinterpret_cast<uint4*>(page)[i] = make_uint4(0, 0, 0, 0);
      }
    }
    __syncthreads();
    for (int slot = warp; slot < PAGE_SIZE; slot += WARPS_PER_BLOCK) {
      const int64_t n = first + slot;
      if (!is_within(n, p.kv_len)) {
        if (lane == 0) reinterpret_cast<int32_t*>(page + layout.position)[slot] = -1;
        continue;
      }
      const char* const row = is_value_half() ? row_of(p.v, b, h, n) : row_of(p.k, b, h, n);
      const int64_t token = head * p.kv_len + n;
      write_row<HEAD_DIM, TIER>(page, slot, books, p.levels, row, p.k.dtype,
                                shift_of_head(p.k_mean, p.turns, head, HEAD_DIM),
                                p.positions[token], scratch[warp]);
      if (lane == 0) {
        write_label(page, layout, slot, p.positions[token], score_bits(p.scores[token]));
      }
    }
    if (TIER == 16) continue;
    __syncthreads();
    copy_page(out, image, p.page_bytes);
  }
}

// A warp per token. grid_shape: as above.
template <int HEAD_DIM, int TIER>
__global__ void __launch_bounds__(THREADS, dequantize_blocks(HEAD_DIM))
    dequantize_kv_kernel(DequantizeParams p, TierBooks codebooks) {
  SMARTKV_SHARED(books, TierBooks);
  SMARTKV_DYNAMIC_SHARED(image, uint8_t);
  const PageLayout layout = page_layout(TIER, HEAD_DIM, dtype_size(p.dtype));
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % HALF_WARP;
  const bool is_v = is_value_half();
  void* const out = is_v ? p.v : p.k;
  if (threadIdx.x == 0) books = codebooks;
  const int64_t items = int64_t{p.batch} * p.num_kv_heads * p.num_pages;
  for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const uint8_t* const page = p.pages + item * p.page_bytes;
    const int64_t first = item * PAGE_SIZE * HEAD_DIM;
    if constexpr (TIER == 16) {
      const int64_t offset = first * dtype_size(p.dtype);
      copy_page(static_cast<uint8_t*>(p.k) + offset, page + layout.k_codes, layout.v_codes);
      copy_page(static_cast<uint8_t*>(p.v) + offset, page + layout.v_codes, layout.v_codes);
    } else {
      __syncthreads();  // the page before this one has been read
      copy_page(image, page, p.page_bytes);
      __syncthreads();
      const KeyShift shift = shift_of_head(p.k_mean, p.turns, item / p.num_pages, HEAD_DIM);
      for (int slot = warp; slot < PAGE_SIZE; slot += WARPS_PER_BLOCK) {
        HeadRow<HEAD_DIM> row = read_codes<HEAD_DIM, TIER>(image, slot, books);
        rotate(row, true);
#pragma unroll
        for (int r = 0; r < HEAD_DIM / HALF_WARP; ++r) {
          if (is_v) continue;
          if (shift.weights != nullptr) row.at[r] /= shift.weights[lane + HALF_WARP * r];
          row.at[r] = __fadd_rn(row.at[r], shift.mean[lane + HALF_WARP * r]);
        }
        if (shift.turns > 0) {
          turn_row<1>(row, shift, reinterpret_cast<const int32_t*>(image + layout.position)[slot],
                      !is_v);
        }
#pragma unroll
        for (int r = 0; r < HEAD_DIM / HALF_WARP; ++r) {
          store_value(out, p.dtype, first + slot * HEAD_DIM + lane + HALF_WARP * r, row.at[r]);
        }
      }
    }
  }
}

// Kernel launchers

// Of a page that is built, or read, in shared memory.
int64_t image_bytes(int tier, int64_t page_bytes) { return tier == 16 ? 0 : page_bytes; }

}  // namespace

const char* quantize_kv_cuda(const QuantizeParams& p, void* stream) {
  const int64_t num_pages = (p.kv_len + PAGE_SIZE - 1) / PAGE_SIZE;
  const int64_t items = int64_t{p.batch} * p.num_kv_heads * num_pages;
  if (items == 0) return nullptr;
  const auto grid = static_cast<unsigned>(std::min(items, most_blocks()));
  SMARTKV_HEAD_DIM_SWITCH(p.head_dim, [&] {
    SMARTKV_TIER_SWITCH(p.tier, [&] {
      SMARTKV_LAUNCH((quantize_kv_kernel<HEAD_DIM, TIER>), grid, THREADS,
                     image_bytes(p.tier, p.page_bytes), static_cast<cudaStream_t>(stream), p,
                     make_tier_books(p.tier, p.levels), num_pages);
    });
  });
  return launch_error();
}

const char* dequantize_kv_cuda(const DequantizeParams& p, void* stream) {
  const int64_t items = int64_t{p.batch} * p.num_kv_heads * p.num_pages;
  if (items == 0) return nullptr;
  const auto grid = static_cast<unsigned>(std::min(items, most_blocks()));
  SMARTKV_HEAD_DIM_SWITCH(p.head_dim, [&] {
    SMARTKV_TIER_SWITCH(p.tier, [&] {
      SMARTKV_LAUNCH((dequantize_kv_kernel<HEAD_DIM, TIER>), grid, THREADS,
                     image_bytes(p.tier, p.page_bytes), static_cast<cudaStream_t>(stream), p,
                     make_tier_books(p.tier, p.levels));
    });
  });
  return launch_error();
}

}  // namespace smartkv
