// change_basis on CUDA: rows less an origin, times the matrix of their KV head, plus a shift.
#include <algorithm>

#include "cuda_ops.h"
#include "scalar.h"

namespace smartkv {
namespace {

constexpr int WARPS_PER_BLOCK = 4;
constexpr int CHANNELS_PER_LANE = MAX_HEAD_DIM / WARP;

// Kernels

// A warp per row, a lane per channel; blocks stride over rows. Made for the few rows of a decode
// step: every row reads its matrix from the caches anew, which a long prefill pays row by row.
// grid_shape: [min(rows / 4, most_blocks())].
template <typename scalar_t>
__global__ void __launch_bounds__(WARP* WARPS_PER_BLOCK)
    change_basis_kernel(ChangeBasisParams p, int64_t rows) {
  const int lane = threadIdx.x % WARP;
  const int group = p.num_heads / p.num_kv_heads;
  scalar_t* __restrict__ out = static_cast<scalar_t*>(p.out);
  const int64_t first = int64_t{blockIdx.x} * WARPS_PER_BLOCK + threadIdx.x / WARP;
  for (int64_t row = first; row < rows; row += int64_t{gridDim.x} * WARPS_PER_BLOCK) {
    const int64_t b = row / p.n / p.num_heads, head = row / p.n % p.num_heads;
    const int64_t kv_head = head / group;
    const float* const matrix = p.matrix + kv_head * p.head_dim * p.head_dim;
    const scalar_t* const x = reinterpret_cast<const scalar_t*>(row_of(p.x, b, head, row % p.n));
    float sum[CHANNELS_PER_LANE] = {};
    for (int k = 0; k < p.head_dim; ++k) {
      const float origin = p.origin == nullptr ? 0.0f : p.origin[kv_head * p.head_dim + k];
      const float factor = to_float(x[k]) - origin;
#pragma unroll
      for (int i = 0; i < CHANNELS_PER_LANE; ++i) {
        const int c = i * WARP + lane;
        if (is_within(c, p.head_dim)) sum[i] = fmaf(factor, matrix[k * p.head_dim + c], sum[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < CHANNELS_PER_LANE; ++i) {
      const int c = i * WARP + lane;
      if (!is_within(c, p.head_dim)) continue;
      const float shift = p.shift == nullptr ? 0.0f : p.shift[kv_head * p.head_dim + c];
      out[row * p.head_dim + c] = from_float<scalar_t>(sum[i] + shift);
    }
  }
}

// Kernel launchers

template <typename scalar_t>
void launch(const ChangeBasisParams& params, int64_t rows, cudaStream_t stream) {
  const int64_t blocks = (rows + WARPS_PER_BLOCK - 1) / WARPS_PER_BLOCK;
  const unsigned grid = static_cast<unsigned>(std::min(blocks, most_blocks()));
  SMARTKV_LAUNCH(change_basis_kernel<scalar_t>, grid, WARP * WARPS_PER_BLOCK, 0, stream, params,
                 rows);
}

}  // namespace

const char* change_basis_cuda(const ChangeBasisParams& params, void* stream) {
  const int64_t rows = int64_t{params.batch} * params.num_heads * params.n;
  if (rows == 0) return nullptr;
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.x.dtype == DType::FLOAT32) launch<float>(params, rows, cuda_stream);
  if (params.x.dtype == DType::BFLOAT16) launch<__nv_bfloat16>(params, rows, cuda_stream);
  if (params.x.dtype == DType::FLOAT16) launch<__half>(params, rows, cuda_stream);
  return launch_error();
}

}  // namespace smartkv
