// The contract between the bindings and the kernels: one plain struct per op, a shape on every
// pointer, strides in elements. No torch header is included anywhere under csrc/include, csrc/cpu
// or csrc/cuda.
//
// The bindings check every shape, dtype, device and value before they fill a struct; kernels trust
// it. Values on a GPU are not checked: CUDA kernels bring page ids, lengths and tiers into range,
// so that wrong ones give wrong results but never touch foreign memory.
#pragma once

#include <cstdint>

#include "turns.h"

namespace smartkv {

constexpr int PAGE_SIZE = 64;  // token records per page
constexpr int MAX_TIERS = 7;   // TIERS in layout.h

enum class DType : int32_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum class Levels : int32_t { UNIFORM = 0, GAUSSIAN = 1 };
// Least precision of the queries and probabilities that meet quantised pages; a kernel set without
// such integer products takes the next finer one. AUTO: what adds next to nothing to the error of
// the codes, 16 bits beside 8-bit codes and 8 bits beside fewer (docs/design/attention-cpu.md).
enum class Precision : int32_t { AUTO = 0, FLOAT32 = 1, INT16 = 2, INT8 = 3 };

// Runs fn(context, begin, end) over disjoint ranges that cover [0, count), on as many threads as
// the host framework grants. The core never owns threads: a second OpenMP runtime beside torch's
// would fight for the same cores.
struct Parallel {
  void (*run)(int64_t count, void* context, void (*fn)(void* context, int64_t begin, int64_t end));
  int num_threads;
};

// A (batch, head, token, head_dim) tensor of any strides but a contiguous last dimension.
struct HeadsView {
  const void* data;
  DType dtype;
  int64_t stride_b, stride_h, stride_n;
};

// The paged, ragged, mixed-tier part of a cache. Tiers are ascending.
struct PagedKV {
  uint8_t* pools[MAX_TIERS];  // [num_pages of the tier, page_bytes of the tier]
  int64_t page_bytes[MAX_TIERS];
  int64_t num_pages[MAX_TIERS];  // of the pools
  int tier_bits[MAX_TIERS];      // of TIERS in layout.h
  int num_tiers;
  const int32_t* block_table;  // [batch, num_kv_heads, num_tiers, max_pages], page ids
  int32_t* cache_seqlens;      // [batch, num_kv_heads, num_tiers], records
  int64_t max_pages;
  const float*
      k_mean;  // [batch, num_kv_heads, head_dim], the key that was subtracted before rotation
  int batch, num_kv_heads, head_dim;
  DType raw_dtype;  // of the values in 16-bit pages: float32 values take 4 bytes
  Levels levels;
  Turns turns{};
};

struct QuantizeParams {
  HeadsView k, v;            // [batch, num_kv_heads, kv_len, head_dim]
  const float* k_mean;       // [batch, num_kv_heads, head_dim]
  const int32_t* positions;  // [batch, num_kv_heads, kv_len] contiguous
  const float* scores;       // [batch, num_kv_heads, kv_len] contiguous
  uint8_t* pages;  // [batch, num_kv_heads, ceil(kv_len / 64), page_bytes], every byte is written
  int64_t page_bytes;
  int batch, num_kv_heads, head_dim;
  int tier;
  int64_t kv_len;
  Levels levels;
  Turns turns{};
};

struct DequantizeParams {
  const uint8_t* pages;  // [batch, num_kv_heads, num_pages, page_bytes] contiguous
  int64_t page_bytes;
  const float* k_mean;  // [batch, num_kv_heads, head_dim]
  void* k;              // [batch, num_kv_heads, num_pages * 64, head_dim] of dtype
  void* v;              // same
  DType dtype;          // for 16-bit pages also the dtype of the stored values
  int batch, num_kv_heads, head_dim;
  int tier;
  int64_t num_pages;
  Levels levels;
  Turns turns{};
};

struct AppendParams {
  PagedKV
      cache;  // cache_seqlens is advanced; block_table must already hold the pages that are needed
  HeadsView k, v;            // [batch, num_kv_heads, new_len, head_dim]
  const int32_t* positions;  // [batch, num_kv_heads, new_len] contiguous
  const float* scores;       // [batch, num_kv_heads, new_len] contiguous
  const int8_t* tiers;  // [batch, num_kv_heads, new_len], index of a tier or -1: skip the token
  int64_t new_len;
};

struct CompactParams {
  PagedKV cache;          // cache_seqlens is rewritten
  const int8_t* targets;  // [batch, num_kv_heads, num_tiers, max_pages * 64]: tier (not above the
                          // present) or -1
};

struct DecodeAttentionParams {
  PagedKV cache;
  HeadsView q;                      // [batch, num_heads, q_len, head_dim]
  HeadsView k_window, v_window;     // [batch, num_kv_heads, window_len, head_dim], same dtype as q
  const int32_t* window_positions;  // [batch, window_len] contiguous, -1: slot holds no token (its
                                    // values may be NaN)
  void* out;                        // [batch, num_heads, q_len, head_dim] contiguous, dtype of q
  float* lse;          // [batch, num_heads, q_len], natural log; -inf where nothing is attended
  float* mass;         // [batch, num_kv_heads, num_tiers, max_pages * 64] zero-filled, or nullptr
  float* window_mass;  // [batch, num_kv_heads, window_len] zero-filled, or nullptr
  int num_heads;
  int64_t q_len, window_len;
  const int64_t* q_start;  // [1], beside the tensors: position of the first query; query i is at
                           // q_start + i
  float softmax_scale;
  int64_t sliding_window;  // 0: none; else a key is seen while its position > query position -
                           // sliding_window
  Precision precision;
};

struct AttentionMassParams {
  HeadsView q;                 // [batch, num_heads, q_len, head_dim]
  HeadsView k;                 // [batch, num_kv_heads, kv_len, head_dim]
  const int32_t* k_positions;  // [batch, kv_len] contiguous, -1: not a token
  const float* lse;            // [batch, num_heads, q_len] natural log, or nullptr: computed here
  float*
      mass;  // [batch, num_kv_heads, kv_len] zero-filled: summed over queries and the query group
  int batch, num_heads, num_kv_heads, head_dim;
  int64_t q_len, kv_len;
  const int64_t* q_start;  // [1], beside the tensors
  float softmax_scale;
  int64_t sliding_window;
};

struct MergeStatesParams {
  const void* o;     // [num_states, rows, head_dim] contiguous
  const float* lse;  // [num_states, rows]
  void* out;         // [rows, head_dim]
  float* out_lse;    // [rows]
  DType dtype;
  int64_t num_states, rows;
  int head_dim;
};

struct GateScoreParams {
  const HeadsView* keys;    // [num_layers] of [batch, num_kv_heads, kv_len, head_dim], one dtype
  const float* weights[3];  // [num_layers, num_kv_heads, out, in] contiguous
  const float* biases[3];   // [num_layers, num_kv_heads, out] contiguous
  int sizes[4];             // head_dim, hidden..., 1
  int num_linear;           // 2 or 3
  float* scores;            // [num_layers, batch, num_kv_heads, kv_len]
  int num_layers, batch, num_kv_heads;
  int64_t kv_len;
};

// (x - origin) times the matrix of the row's KV head, + shift.
struct ChangeBasisParams {
  HeadsView x;          // [batch, num_heads, n, head_dim]
  const float* matrix;  // [num_kv_heads, head_dim, head_dim] contiguous, in by out
  const float* origin;  // [num_kv_heads, head_dim] contiguous, or null: none
  const float* shift;   // likewise
  void* out;            // [batch, num_heads, n, head_dim] contiguous, dtype of x
  int batch, num_heads, num_kv_heads, head_dim;
  int64_t n;
};

struct SelectParams {
  const float* scores;     // [groups, heads, n]; -inf: not a candidate
  const int8_t* current;   // [groups, heads, n]: present tier, num_tiers: still in full precision,
                           // -1: no token
  const int64_t* budgets;  // [groups] bytes
  int64_t page_bytes[MAX_TIERS];
  double distortion[MAX_TIERS];  // relative squared error that a tier leaves
  double evict_distortion;
  double zipf_offset;
  int num_tiers;
  int8_t* tiers;  // [groups, heads, n]: tier or -1
  int64_t groups, heads, n;
};

// One entry per op; a kernel set (portable, AVX2, AVX-512) fills one table. Chosen once per
// process, see isa.h.
struct KernelTable {
  const char* name;
  void (*quantize_kv)(const QuantizeParams&, const Parallel&);
  void (*dequantize_kv)(const DequantizeParams&, const Parallel&);
  void (*append_kv)(const AppendParams&, const Parallel&);
  void (*compact_kv)(const CompactParams&, const Parallel&);
  void (*decode_attention)(const DecodeAttentionParams&, const Parallel&);
  void (*attention_mass)(const AttentionMassParams&, const Parallel&);
  void (*merge_states)(const MergeStatesParams&, const Parallel&);
  void (*gate_score)(const GateScoreParams&, const Parallel&);
  void (*change_basis)(const ChangeBasisParams&, const Parallel&);
  void (*select_kv)(const SelectParams&, const Parallel&);
};

// The kernel set of this process: the best that the CPU has, or the one that
// SMARTKV_ISA=portable|avx2|avx512 names. Throws std::runtime_error naming the variable, its value
// and what is accepted, if that set is unknown or cannot run here.
const KernelTable& cpu_kernels();

}  // namespace smartkv
