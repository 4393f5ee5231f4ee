// merge_states on CUDA: combines attention states over disjoint keys by their log-sum-exp.
#include <algorithm>
#include <cmath>

#include "cuda_ops.h"
#include "scalar.h"

namespace smartkv {
namespace {

constexpr int WARPS_PER_BLOCK = 4;
constexpr int CHANNELS_PER_LANE = MAX_HEAD_DIM / WARP;

// Kernels

// Log-sum-exp over the states of a row, the same in all lanes; -inf where all states are empty.
__device__ float merged_lse(const MergeStatesParams& p, int64_t row, int lane) {
  float top = -INFINITY;
  for (int64_t s = lane; s < p.num_states; s += WARP) {
    top = max_or_nan(top, p.lse[s * p.rows + row]);
  }
  top = max_lanes<WARP>(top);
  if (top == -INFINITY) return -INFINITY;
  float total = 0;
  for (int64_t s = lane; s < p.num_states; s += WARP) total += expf(p.lse[s * p.rows + row] - top);
  return top + logf(sum_lanes<WARP>(total));
}

// A warp per row, a lane per channel; blocks stride over rows. grid_shape: [min(rows / 4,
// most_blocks())].
template <typename scalar_t>
__global__ void __launch_bounds__(WARP* WARPS_PER_BLOCK) merge_states_kernel(MergeStatesParams p) {
  const int lane = threadIdx.x % WARP;
  const scalar_t* __restrict__ o = static_cast<const scalar_t*>(p.o);
  scalar_t* __restrict__ out = static_cast<scalar_t*>(p.out);
  const int64_t first = int64_t{blockIdx.x} * WARPS_PER_BLOCK + threadIdx.x / WARP;
  for (int64_t row = first; row < p.rows; row += int64_t{gridDim.x} * WARPS_PER_BLOCK) {
    const float merged = merged_lse(p, row, lane);
    float sum[CHANNELS_PER_LANE] = {};
    for (int64_t s = 0; s < p.num_states; ++s) {
      const float lse = p.lse[s * p.rows + row];
      const float weight = lse == -INFINITY ? 0.0f : expf(lse - merged);
      if (weight == 0) continue;  // such a state may hold NaN
      const scalar_t* const state = o + (s * p.rows + row) * p.head_dim;
#pragma unroll
      for (int i = 0; i < CHANNELS_PER_LANE; ++i) {
        const int c = i * WARP + lane;
        if (is_within(c, p.head_dim)) sum[i] = fmaf(weight, to_float(state[c]), sum[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < CHANNELS_PER_LANE; ++i) {
      const int c = i * WARP + lane;
      if (is_within(c, p.head_dim)) out[row * p.head_dim + c] = from_float<scalar_t>(sum[i]);
    }
    if (lane == 0) p.out_lse[row] = merged;
  }
}

// Kernel launchers

template <typename scalar_t>
void launch(const MergeStatesParams& params, cudaStream_t stream) {
  const int64_t blocks = (params.rows + WARPS_PER_BLOCK - 1) / WARPS_PER_BLOCK;
  const unsigned grid = static_cast<unsigned>(std::min(blocks, most_blocks()));
  SMARTKV_LAUNCH(merge_states_kernel<scalar_t>, grid, WARP * WARPS_PER_BLOCK, 0, stream, params);
}

}  // namespace

const char* merge_states_cuda(const MergeStatesParams& params, void* stream) {
  if (params.rows == 0) return nullptr;
  const cudaStream_t cuda_stream = static_cast<cudaStream_t>(stream);
  if (params.dtype == DType::FLOAT32) launch<float>(params, cuda_stream);
  if (params.dtype == DType::BFLOAT16) launch<__nv_bfloat16>(params, cuda_stream);
  if (params.dtype == DType::FLOAT16) launch<__half>(params, cuda_stream);
  return launch_error();
}

}  // namespace smartkv
