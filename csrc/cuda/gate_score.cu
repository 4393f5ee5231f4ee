// gate_score on CUDA. Many tokens of 16 bits: weights as bfloat16 in shared memory, activations in
// registers, products on the tensor cores. Few tokens, or float32: every weight is read once per
// eight tokens, products in float32.
#include <algorithm>

#include "cuda_ops.h"
#include "ptx.h"
#include "scalar.h"

namespace smartkv {
namespace {

constexpr int MAX_LAYERS = 64;  // per launch: their views are arguments of the kernel
constexpr int WARPS_PER_BLOCK = 8;
constexpr int THREADS = WARP * WARPS_PER_BLOCK;
constexpr int ROW_TOKENS = 16;   // of an operand A
constexpr int FEW_TOKENS = 8;    // of a block of the float32 kernel, or one
constexpr int MANY_TOKENS = 32;  // from here on the tensor cores are faster
constexpr int MAX_LINEAR = 3;
constexpr int ROW_PADDING = 8;   // elements, against bank conflicts
constexpr int MAX_HIDDEN = 256;  // of the first layer, in registers

// Operands A of a warp: what an operand B from shared memory serves. Two where a block has all
// registers of its multiprocessor.
constexpr int row_tiles(int hidden) { return hidden > 64 ? 2 : 1; }
constexpr int tile_tokens(int hidden) { return ROW_TOKENS * row_tiles(hidden) * WARPS_PER_BLOCK; }

// Outputs that a warp of the float32 kernel computes at a time: a decode step is bound by the
// weights, of which one row per warp would keep too few bytes on their way.
constexpr int outputs_of_warp(int tokens) { return tokens == 1 ? 8 : 1; }

struct KeyViews {
  HeadsView of_layer[MAX_LAYERS];
};

// Kernels

// Of the (layer, batch, head) that blockIdx.y names.
struct Item {
  int layer, batch, head;
  int64_t gate;  // index in weights and biases
};

__device__ __forceinline__ Item item_of_block(const GateScoreParams& p, int first_layer) {
  const int head = static_cast<int>(blockIdx.y) % p.num_kv_heads;
  const int batch = static_cast<int>(blockIdx.y) / p.num_kv_heads % p.batch;
  const int layer = static_cast<int>(blockIdx.y) / p.num_kv_heads / p.batch;
  return {layer, batch, head, int64_t{first_layer + layer} * p.num_kv_heads + head};
}

__device__ __forceinline__ float* scores_of(const GateScoreParams& p, const Item& item,
                                            int first_layer) {
  const int64_t row =
      (int64_t{first_layer + item.layer} * p.batch + item.batch) * p.num_kv_heads + item.head;
  return p.scores + row * p.kv_len;
}

// A warp per outputs_of_warp() outputs of a layer, for up to TOKENS tokens. Shared memory: two
// buffers of [TOKENS, widest layer] floats.
// grid_shape: [kv_len / TOKENS, layers * batch * num_kv_heads].
template <int TOKENS>
__global__ void __launch_bounds__(THREADS)
    gate_score_few_kernel(GateScoreParams p, KeyViews views, int first_layer, int width) {
  SMARTKV_DYNAMIC_SHARED(buffers, float);
  constexpr int OUTPUTS = outputs_of_warp(TOKENS);
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const Item item = item_of_block(p, first_layer);
  const HeadsView& keys = views.of_layer[item.layer];
  const int64_t first = int64_t{blockIdx.x} * TOKENS;
  const int count = static_cast<int>(min(p.kv_len - first, int64_t{TOKENS}));
  float *x = buffers, *y = buffers + TOKENS * width;
  for (int i = threadIdx.x; i < TOKENS * p.sizes[0]; i += THREADS) {
    const int token = i / p.sizes[0], c = i % p.sizes[0];
    x[token * width + c] =
        is_within(token, count)
            ? load_value(row_of(keys, item.batch, item.head, first + token), keys.dtype, c)
            : 0.0f;
  }
#pragma unroll
  for (int layer = 0; layer < MAX_LINEAR; ++layer) {
    if (layer >= p.num_linear) break;
    const int in = p.sizes[layer], out = p.sizes[layer + 1];
    __syncthreads();
    for (int o = warp * OUTPUTS; o < out; o += WARPS_PER_BLOCK * OUTPUTS) {
      const float* weight[OUTPUTS];
#pragma unroll
      for (int k = 0; k < OUTPUTS; ++k) {
        weight[k] = p.weights[layer] + (item.gate * out + clamp_to(0, o + k, out - 1)) * in;
      }
      float sum[OUTPUTS][TOKENS] = {};
#pragma unroll 2
      for (int i = lane; i < in; i += WARP) {
        float w[OUTPUTS];
#pragma unroll
        for (int k = 0; k < OUTPUTS; ++k) w[k] = weight[k][i];
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
          const float value = x[token * width + i];
#pragma unroll
          for (int k = 0; k < OUTPUTS; ++k) sum[k][token] = fmaf(w[k], value, sum[k][token]);
        }
      }
#pragma unroll
      for (int k = 0; k < OUTPUTS; ++k) {
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
          const float total = sum_lanes<WARP>(sum[k][token]);
          if (lane != k * TOKENS + token || !is_within(o + k, out)) continue;
          const float value = total + p.biases[layer][item.gate * out + o + k];
          y[token * width + o + k] = layer + 1 < p.num_linear ? max_or_nan(value, 0) : value;
        }
      }
    }
    float* const swap = x;
    x = y;
    y = swap;
  }
  // No barrier: the last layer has one output, and a thread reads what itself has written.
  if (is_within(static_cast<int>(threadIdx.x), count)) {
    scores_of(p, item, first_layer)[first + threadIdx.x] = x[threadIdx.x * width];
  }
}

__device__ __forceinline__ unsigned pack_bf16(float a, float b) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(a)) |
         static_cast<unsigned>(__bfloat16_as_ushort(__float2bfloat16_rn(b))) << 16;
}

// The shared memory of the tensor core kernel, in bytes; `rows` outputs of the last hidden layer.
template <int HIDDEN>
struct GateLayout {
  int in_row, weights, last_weights, biases, bytes;

  constexpr GateLayout(int head_dim, int rows)
      : in_row(head_dim + ROW_PADDING),
        weights(0),
        last_weights(HIDDEN * in_row * 2),
        biases(last_weights + rows * (HIDDEN + ROW_PADDING) * 2),
        bytes(biases + (2 * HIDDEN + 2 * rows) * 4) {}
};

// Rows [0, rows) of a weight (out, in) as bfloat16, zeros where it has none.
__device__ __forceinline__ void load_weights(uint16_t* to, int row_elements, int rows, int columns,
                                             const float* from, int out, int in) {
#pragma unroll 16  // loads on their way: a block waits for its weights alone
  for (int i = threadIdx.x; i < rows * columns; i += THREADS) {
    const int row = i / columns, column = i % columns;
    const bool exists = is_within(row, out) && is_within(column, in);
    const float value = exists ? from[int64_t{row} * in + column] : 0.0f;
    to[row * row_elements + column] = __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
}

__device__ __forceinline__ void load_floats(float* to, int count, const float* from, int have) {
  for (int i = threadIdx.x; i < count; i += THREADS) to[i] = is_within(i, have) ? from[i] : 0.0f;
}

// Operand B for 16 outputs from `output` and 16 inputs from `input`: two tiles of 8 outputs.
__device__ __forceinline__ void load_operand(unsigned (&b)[4], const uint16_t* weights,
                                             int row_elements, int output, int input) {
  const int lane = threadIdx.x % WARP, matrix = lane / 8;
  load_matrices(
      b, weights + (output + lane % 8 + matrix / 2 * 8) * row_elements + input + matrix % 2 * 8);
}

__device__ __forceinline__ void multiply_pair(float (&sum)[2][4], const unsigned (&a)[4],
                                              const unsigned (&b)[4]) {
  const unsigned low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
  multiply_bf16(sum[0], a, low);
  multiply_bf16(sum[1], a, high);
}

// Four results of 16 tokens by 8 outputs, plus bias, and no less than 0.
__device__ __forceinline__ void activate(float (&x)[4], const float* bias) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = max_or_nan(x[i] + bias[2 * t + i % 2], 0);
}

// What the last layer makes of them, for the tokens g and g + 8.
__device__ __forceinline__ void add_scores(float (&score)[2], const float (&x)[4],
                                           const float* weight) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) score[i / 2] = fmaf(x[i], weight[2 * t + i % 2], score[i / 2]);
}

// Operand A of the 16 tokens from `first`; those behind the end get some key that exists.
template <int HEAD_DIM>
__device__ __forceinline__ void load_keys(unsigned (&x)[HEAD_DIM / 16][4], const HeadsView& keys,
                                          const Item& item, int64_t first, int64_t kv_len) {
  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int64_t n = first + g + 8 * row;
    const char* const key =
        row_of(keys, item.batch, item.head, is_within(n, kv_len) ? n : kv_len - 1);
#pragma unroll
    for (int chunk = 0; chunk < HEAD_DIM / 16; ++chunk) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int c = chunk * 16 + 8 * half + 2 * t;
        x[chunk][row + 2 * half] =
            pack_bf16(load_value(key, keys.dtype, c), load_value(key, keys.dtype, c + 1));
      }
    }
  }
}

// A warp per 16 or 32 tokens. Only `rows` outputs of the last hidden layer, from `first_row`, have
// their weights in shared memory: the launches for the others add to the scores. grid_shape: [parts
// of the tokens, layers * batch * num_kv_heads].
template <int HEAD_DIM, int HIDDEN>
__global__ void __launch_bounds__(THREADS, HIDDEN > 64 ? 1 : 2)
    gate_score_kernel(GateScoreParams p, KeyViews views, int first_layer, int first_row, int rows) {
  SMARTKV_DYNAMIC_SHARED(shared, unsigned char);
  constexpr int CHUNKS = HEAD_DIM / 16, HIDDEN_CHUNKS = HIDDEN / 16, ROW_TILES = row_tiles(HIDDEN);
  const bool has_two = p.num_linear == 3;
  const GateLayout<HIDDEN> layout(HEAD_DIM, has_two ? rows : 0);
  auto* const weights = reinterpret_cast<uint16_t*>(shared + layout.weights);
  auto* const last_weights = reinterpret_cast<uint16_t*>(shared + layout.last_weights);
  auto* const bias = reinterpret_cast<float*>(shared + layout.biases);
  float* const head = bias + HIDDEN;  // weights of the last layer
  float *const last_bias = head + HIDDEN, *const last_head = last_bias + rows;
  constexpr int LAST_ROW = HIDDEN + ROW_PADDING;

  const Item item = item_of_block(p, first_layer);
  const HeadsView& keys = views.of_layer[item.layer];
  const int hidden = p.sizes[1];
  load_weights(weights, layout.in_row, HIDDEN, HEAD_DIM,
               p.weights[0] + item.gate * hidden * HEAD_DIM, hidden, HEAD_DIM);
  load_floats(bias, HIDDEN, p.biases[0] + item.gate * hidden, hidden);
  if (has_two) {
    const int last = p.sizes[2], have = min(rows, last - first_row);
    const int64_t at = item.gate * last + first_row;
    load_weights(last_weights, LAST_ROW, rows, HIDDEN, p.weights[1] + at * hidden, have, hidden);
    load_floats(last_bias, rows, p.biases[1] + at, have);
    load_floats(last_head, rows, p.weights[2] + at, have);
  } else {
    load_floats(head, HIDDEN, p.weights[1] + item.gate * hidden, hidden);
  }
  __syncthreads();

  const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
  constexpr int TILE_TOKENS = tile_tokens(HIDDEN);
  const int64_t tiles = (p.kv_len + TILE_TOKENS - 1) / TILE_TOKENS;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t first = tile * TILE_TOKENS + threadIdx.x / WARP * (ROW_TOKENS * ROW_TILES);
    if (first >= p.kv_len) continue;  // saves work
    float score[ROW_TILES][2] = {};
    unsigned y[ROW_TILES][HIDDEN_CHUNKS][4];
    unsigned x[ROW_TILES][CHUNKS][4];
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      load_keys<HEAD_DIM>(x[r], keys, item, first + ROW_TOKENS * r, p.kv_len);
    }
#pragma unroll
    for (int out = 0; out < HIDDEN_CHUNKS; ++out) {
      float sum[ROW_TILES][2][4] = {};
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk) {
        unsigned b[4];
        load_operand(b, weights, layout.in_row, out * 16, chunk * 16);
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) multiply_pair(sum[r], x[r][chunk], b);
      }
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          activate(sum[r][i], bias + out * 16 + 8 * i);
          if (!has_two) add_scores(score[r], sum[r][i], head + out * 16 + 8 * i);
          y[r][out][2 * i] = pack_bf16(sum[r][i][0], sum[r][i][1]);
          y[r][out][2 * i + 1] = pack_bf16(sum[r][i][2], sum[r][i][3]);
        }
      }
    }
    for (int out = 0; has_two && out < rows; out += 16) {
      float sum[ROW_TILES][2][4] = {};
#pragma unroll
      for (int chunk = 0; chunk < HIDDEN_CHUNKS; ++chunk) {
        unsigned b[4];
        load_operand(b, last_weights, LAST_ROW, out, chunk * 16);
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) multiply_pair(sum[r], y[r][chunk], b);
      }
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          activate(sum[r][i], last_bias + out + 8 * i);
          add_scores(score[r], sum[r][i], last_head + out + 8 * i);
        }
      }
    }
    float* const scores = scores_of(p, item, first_layer);
    // Not p.biases[p.num_linear - 1]: that would make a copy of the arguments in local memory.
    const float* const final_bias = has_two ? p.biases[2] : p.biases[1];
#pragma unroll
    for (int row = 0; row < 2 * ROW_TILES; ++row) {
      const float sum = sum_lanes<4>(score[row / 2][row % 2]);
      const int64_t n = first + g + 8 * row;
      if (t != 0 || !is_within(n, p.kv_len)) continue;
      scores[n] = sum + (first_row == 0 ? final_bias[item.gate] : scores[n]);
    }
  }
}

// Kernel launchers

template <int TOKENS>
const char* launch_few(const GateScoreParams& p, const KeyViews& views, int first_layer, int layers,
                       cudaStream_t stream) {
  int width = 0;
  for (int i = 0; i <= p.num_linear; ++i) width = std::max(width, p.sizes[i]);
  const int64_t bytes = int64_t{2} * TOKENS * width * sizeof(float);
  if (bytes > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) {
    return "a layer of the gate is too wide for the shared memory of this GPU";
  }
  const auto kernel = gate_score_few_kernel<TOKENS>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(bytes));
  const dim3 grid(static_cast<unsigned>((p.kv_len + TOKENS - 1) / TOKENS),
                  static_cast<unsigned>(layers * p.batch * p.num_kv_heads));
  SMARTKV_LAUNCH(kernel, grid, THREADS, bytes, stream, p, views, first_layer, width);
  return launch_error();
}

// So many that the last round of blocks over the GPU is nearly full. To load the weights takes a
// block about as long as a tile.
int64_t blocks_per_item(int64_t items, int64_t tiles) {
  const int64_t at_once = device_attribute(cudaDevAttrMultiProcessorCount);
  int64_t best = 1, least = INT64_MAX;
  for (int64_t blocks = 1; blocks <= std::min(tiles, at_once); ++blocks) {
    const int64_t rounds = (items * blocks + at_once - 1) / at_once;
    const int64_t time = rounds * (1 + (tiles + blocks - 1) / blocks);
    if (time < least) {
      least = time;
      best = blocks;
    }
  }
  return best;
}

template <int HEAD_DIM, int HIDDEN>
void launch_many(const GateScoreParams& p, const KeyViews& views, int first_layer, int layers,
                 cudaStream_t stream) {
  const int most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int last = p.num_linear == 3 ? (p.sizes[2] + 15) / 16 * 16 : 16;
  int rows = last;
  while (rows > 16 && GateLayout<HIDDEN>(HEAD_DIM, rows).bytes > most)
    rows = (rows / 2 + 15) / 16 * 16;
  const int bytes = GateLayout<HIDDEN>(HEAD_DIM, p.num_linear == 3 ? rows : 0).bytes;
  const auto kernel = gate_score_kernel<HEAD_DIM, HIDDEN>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const int64_t items = int64_t{layers} * p.batch * p.num_kv_heads;
  const int64_t tiles = (p.kv_len + tile_tokens(HIDDEN) - 1) / tile_tokens(HIDDEN);
  const dim3 grid(static_cast<unsigned>(blocks_per_item(items, tiles)),
                  static_cast<unsigned>(items));
  for (int first_row = 0; first_row < last; first_row += rows) {
    SMARTKV_LAUNCH(kernel, grid, THREADS, static_cast<size_t>(bytes), stream, p, views, first_layer,
                   first_row, rows);
  }
}

}  // namespace

const char* gate_score_cuda(const GateScoreParams& p, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const bool few = p.kv_len < MANY_TOKENS || p.keys[0].dtype == DType::FLOAT32 ||
                   p.sizes[1] > MAX_HIDDEN || p.sizes[0] > 128;
  for (int first = 0; first < p.num_layers; first += MAX_LAYERS) {
    const int layers = std::min(MAX_LAYERS, p.num_layers - first);
    KeyViews views{};
    std::copy_n(p.keys + first, layers, views.of_layer);
    if (few) {
      const char* const error = p.kv_len == 1
                                    ? launch_few<1>(p, views, first, layers, cuda_stream)
                                    : launch_few<FEW_TOKENS>(p, views, first, layers, cuda_stream);
      if (error != nullptr) return error;
      continue;
    }
    SMARTKV_HEAD_DIM_SWITCH(p.sizes[0], [&] {
      if constexpr (HEAD_DIM <= 128) {
        p.sizes[1] <= 64 ? launch_many<HEAD_DIM, 64>(p, views, first, layers, cuda_stream)
                         : launch_many<HEAD_DIM, MAX_HIDDEN>(p, views, first, layers, cuda_stream);
      }
    });
  }
  return launch_error();
}

}  // namespace smartkv
