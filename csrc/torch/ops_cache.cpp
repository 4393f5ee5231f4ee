// Bindings of append_kv and compact_kv, which mutate a paged cache. All checks come before the
// kernel, so that a refused call leaves the cache as it was.
#include <algorithm>

#include "paged.h"
#include "register.h"

namespace smartkv::binding {
namespace {

// Every list needs room for its new records, in pages of the pool.
void check_append(const PagedInput& input, const AppendParams& params) {
  const PagedKV& cache = input.cache;
  const int64_t heads = int64_t{cache.batch} * cache.num_kv_heads;
  for (int64_t head = 0; head < heads; ++head) {
    int64_t added[MAX_TIERS] = {};
    for (int64_t i = 0; i < params.new_len; ++i) {
      const int tier = params.tiers[head * params.new_len + i];
      check(tier >= -1 && tier < cache.num_tiers, "tiers must be in [-1, ", cache.num_tiers - 1,
            "]; got ", tier);
      if (tier >= 0) ++added[tier];
    }
    for (int t = 0; t < cache.num_tiers; ++t) {
      const int64_t list = head * cache.num_tiers + t;
      const int64_t length = cache.cache_seqlens[list];
      if (added[t] > 0) {
        check_pages(input, list, length / PAGE_SIZE, pages_for(length + added[t]));
      }
    }
  }
}

void append_kv(const std::vector<Tensor>& pools, const Tensor& block_table,
               const Tensor& cache_seqlens, const Tensor& k, const Tensor& v, const Tensor& k_mean,
               const Tensor& positions, const Tensor& scores, const Tensor& tiers,
               const std::vector<int64_t>& tier_bits, StringHandle levels,
               const std::optional<Tensor>& k_turns, const std::optional<Tensor>& turn_steps,
               const std::optional<Tensor>& k_weights) {
  const Levels level_kind = take_levels(levels);
  const Place place(k, "k");
  const DType dtype = float_dtype(k, "k");
  const PagedInput input = paged_input(place, pools, block_table, cache_seqlens, k_mean, tier_bits,
                                       level_kind, dtype, k_turns, turn_steps, k_weights);
  AppendParams params{};
  params.cache = input.cache;
  params.k = heads_view(place, k, "k", dtype);
  params.v = heads_view(place, v, "v", dtype);
  const int64_t batch = input.cache.batch, heads = input.cache.num_kv_heads;
  params.new_len = check_int32(k.size(2), "n", 0);
  const Shape values = {batch, heads, params.new_len, input.cache.head_dim};
  check_shape(k, "k", values, "(batch, num_kv_heads, n, head_dim)");
  check_shape(v, "v", values, "(batch, num_kv_heads, n, head_dim)");
  const Shape per_token = {batch, heads, params.new_len};
  const char* const dims = "(batch, num_kv_heads, n)";
  const Tensor position =
      dense_input(place, positions, "positions", ScalarType::Int, per_token, dims);
  const Tensor score = dense_input(place, scores, "scores", ScalarType::Float, per_token, dims);
  const Tensor tier = dense_input(place, tiers, "tiers", ScalarType::Char, per_token, dims);
  params.positions = position.const_data_ptr<int32_t>();
  params.scores = score.const_data_ptr<float>();
  params.tiers = tier.const_data_ptr<int8_t>();
  if (place.has_readable_values()) check_append(input, params);
  if (params.new_len > 0) place.run(&KernelTable::append_kv, params);
}

// Targets may only name the present tier, a lower one, or -1; each list must then have room.
void check_compact(const PagedInput& input, const int8_t* targets) {
  const PagedKV& cache = input.cache;
  const int64_t stride = cache.max_pages * PAGE_SIZE;
  const int64_t heads = int64_t{cache.batch} * cache.num_kv_heads;
  for (int64_t head = 0; head < heads; ++head) {
    int64_t new_length[MAX_TIERS] = {};
    const int64_t first_list = head * cache.num_tiers;
    for (int t = 0; t < cache.num_tiers; ++t) {
      const int8_t* const target = targets + (first_list + t) * stride;
      for (int64_t i = 0; i < cache.cache_seqlens[first_list + t]; ++i) {
        const int to = target[i];
        check(to >= -1 && to <= t, "targets must be in [-1, ", t, "] for records of tier ", t,
              ": a record can not rise; got ", to);
        if (to >= 0) ++new_length[to];
      }
    }
    for (int t = 0; t < cache.num_tiers; ++t) {
      const int64_t old_length = cache.cache_seqlens[first_list + t];
      check_pages(input, first_list + t, 0, pages_for(std::max(old_length, new_length[t])));
    }
  }
}

void compact_kv(const std::vector<Tensor>& pools, const Tensor& block_table,
                const Tensor& cache_seqlens, const Tensor& targets, const Tensor& k_mean,
                const std::vector<int64_t>& tier_bits, StringHandle levels, ScalarType dtype,
                const std::optional<Tensor>& k_turns, const std::optional<Tensor>& turn_steps,
                const std::optional<Tensor>& k_weights) {
  const Levels level_kind = take_levels(levels);
  const Place place(block_table, "block_table");
  const PagedInput input =
      paged_input(place, pools, block_table, cache_seqlens, k_mean, tier_bits, level_kind,
                  float_dtype(dtype, "dtype"), k_turns, turn_steps, k_weights);
  const PagedKV& cache = input.cache;
  const Tensor target =
      dense_input(place, targets, "targets", ScalarType::Char,
                  {cache.batch, cache.num_kv_heads, cache.num_tiers, cache.max_pages * PAGE_SIZE},
                  "(batch, num_kv_heads, num_tiers, max_pages * 64)");
  CompactParams params{};
  params.cache = cache;
  params.targets = target.const_data_ptr<int8_t>();
  if (place.has_readable_values()) check_compact(input, params.targets);
  if (cache.max_pages > 0) place.run(&KernelTable::compact_kv, params);
}

}  // namespace

SMARTKV_REGISTER_OPS(m) {
  m.impl("append_kv", TORCH_BOX(&append_kv));
  m.impl("compact_kv", TORCH_BOX(&compact_kv));
}

}  // namespace smartkv::binding
