// Bindings of decode_attention, attention_mass and merge_states.
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>

#include "merge_input.h"
#include "paged.h"
#include "register.h"

namespace smartkv::binding {
namespace {

// Arguments that place queries among keys; returns q_start, which a kernel may read. The last query
// position must fit an int32.
const int64_t* check_query(const Place& place, int64_t q_len, const Tensor& q_start,
                           double softmax_scale, int64_t sliding_window) {
  check_int32(q_len, "q_len", 1);
  place.check(q_start, "q_start");
  check_dtype(q_start, "q_start", ScalarType::Long);
  check_shape(q_start, "q_start", {1}, "(1,)");
  const int64_t* const start = q_start.const_data_ptr<int64_t>();
  if (place.has_readable_values()) {
    check_int32(*start, "q_start", 0);
    check_int32(*start + q_len, "q_start + q_len", 1);
  }
  check(std::isfinite(softmax_scale), "softmax_scale must be finite; got ", softmax_scale);
  check(sliding_window >= 0, "sliding_window must be at least 0 (0: none); got ", sliding_window);
  return start;
}

void check_read_pages(const PagedInput& input) {
  for (int64_t list = 0; list < num_lists(input.cache); ++list) {
    check_pages(input, list, 0, pages_for(input.cache.cache_seqlens[list]));
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> decode_attention(
    const Tensor& q, const std::vector<Tensor>& pools, const Tensor& block_table,
    const Tensor& cache_seqlens, const Tensor& k_mean, const Tensor& k_window,
    const Tensor& v_window, const Tensor& window_positions, const Tensor& q_start,
    const std::vector<int64_t>& tier_bits, StringHandle levels, double softmax_scale,
    int64_t sliding_window, bool return_mass, StringHandle precision,
    const std::optional<Tensor>& k_turns, const std::optional<Tensor>& turn_steps,
    const std::optional<Tensor>& k_weights) {
  const Levels level_kind = take_levels(levels);
  const Precision least_precision = take_precision(precision);
  const Place place(q, "q");
  const DType dtype = float_dtype(q, "q");
  const PagedInput input = paged_input(place, pools, block_table, cache_seqlens, k_mean, tier_bits,
                                       level_kind, dtype, k_turns, turn_steps, k_weights);
  const PagedKV& cache = input.cache;
  DecodeAttentionParams params{};
  params.cache = cache;
  params.q = heads_view(place, q, "q", dtype);
  params.k_window = heads_view(place, k_window, "k_window", dtype);
  params.v_window = heads_view(place, v_window, "v_window", dtype);
  const int64_t batch = cache.batch, num_kv_heads = cache.num_kv_heads;
  const int64_t num_heads = q.size(1), q_len = q.size(2);
  check_shape(q, "q", {batch, num_heads, q_len, cache.head_dim},
              "(batch, num_heads, q_len, head_dim)");
  params.num_heads = check_num_heads(num_heads, num_kv_heads, "q");
  params.q_start = check_query(place, q_len, q_start, softmax_scale, sliding_window);
  const int64_t window_len = check_int32(k_window.size(2), "window_len", 0);
  const Shape window = {batch, num_kv_heads, window_len, cache.head_dim};
  check_shape(k_window, "k_window", window, "(batch, num_kv_heads, window_len, head_dim)");
  check_shape(v_window, "v_window", window, "(batch, num_kv_heads, window_len, head_dim)");
  const Tensor positions = dense_input(place, window_positions, "window_positions", ScalarType::Int,
                                       {batch, window_len}, "(batch, window_len)");
  if (place.has_readable_values()) check_read_pages(input);

  const Tensor out = torch::stable::new_empty(q, {batch, num_heads, q_len, cache.head_dim});
  const Tensor lse = torch::stable::new_empty(q, {batch, num_heads, q_len}, ScalarType::Float);
  const auto make_mass = [&](std::initializer_list<int64_t> shape) {
    return return_mass ? torch::stable::new_zeros(q, shape, ScalarType::Float)
                       : torch::stable::new_empty(q, {0}, ScalarType::Float);
  };
  const Tensor mass =
      make_mass({batch, num_kv_heads, cache.num_tiers, cache.max_pages * PAGE_SIZE});
  const Tensor window_mass = make_mass({batch, num_kv_heads, window_len});
  params.window_positions = positions.const_data_ptr<int32_t>();
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  params.mass = return_mass ? mass.mutable_data_ptr<float>() : nullptr;
  params.window_mass = return_mass ? window_mass.mutable_data_ptr<float>() : nullptr;
  params.q_len = q_len;
  params.window_len = window_len;
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.sliding_window = sliding_window;
  params.precision = least_precision;
  place.run(&KernelTable::decode_attention, params);
  return {out, lse, mass, window_mass};
}

Tensor attention_mass(const Tensor& q, const Tensor& k, const Tensor& k_positions,
                      const Tensor& q_start, double softmax_scale, int64_t sliding_window,
                      const std::optional<Tensor>& lse) {
  const Place place(q, "q");
  const DType dtype = float_dtype(q, "q");
  AttentionMassParams params{};
  params.q = heads_view(place, q, "q", dtype);
  params.k = heads_view(place, k, "k", dtype);
  const auto sizes = q.sizes();
  const int64_t num_kv_heads = k.size(1), kv_len = k.size(2);
  check_shape(k, "k", {sizes[0], num_kv_heads, kv_len, sizes[3]},
              "(batch, num_kv_heads, kv_len, head_dim)");
  params.batch = check_int32(sizes[0], "batch", 1);
  params.num_kv_heads = check_int32(num_kv_heads, "num_kv_heads", 1);
  params.num_heads = check_num_heads(sizes[1], num_kv_heads, "q");
  params.head_dim = check_head_dim(sizes[3]);
  params.q_len = sizes[2];
  params.kv_len = check_int32(kv_len, "kv_len", 0);
  params.q_start = check_query(place, sizes[2], q_start, softmax_scale, sliding_window);
  const Tensor positions = dense_input(place, k_positions, "k_positions", ScalarType::Int,
                                       {sizes[0], kv_len}, "(batch, kv_len)");
  params.k_positions = positions.const_data_ptr<int32_t>();
  std::optional<Tensor> row_lse;
  if (lse.has_value()) {
    row_lse = dense_input(place, *lse, "lse", ScalarType::Float, {sizes[0], sizes[1], sizes[2]},
                          "(batch, num_heads, q_len)");
    params.lse = row_lse->const_data_ptr<float>();
  }
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.sliding_window = sliding_window;
  const Tensor mass =
      torch::stable::new_zeros(q, {sizes[0], num_kv_heads, kv_len}, ScalarType::Float);
  params.mass = mass.mutable_data_ptr<float>();
  if (kv_len > 0) place.run(&KernelTable::attention_mass, params);
  return mass;
}

std::tuple<Tensor, Tensor> merge_states(const Tensor& o, const Tensor& lse) {
  const Place place(o, "o");
  place.check(lse, "lse");
  const MergeInput input = merge_input(o, lse);
  if (input.params.rows > 0) place.run(&KernelTable::merge_states, input.params);
  return {input.out, input.out_lse};
}

}  // namespace

SMARTKV_REGISTER_OPS(m) {
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("attention_mass", TORCH_BOX(&attention_mass));
  m.impl("merge_states", TORCH_BOX(&merge_states));
}

}  // namespace smartkv::binding
