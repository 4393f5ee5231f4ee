// Checks of the arguments that every op on a paged cache takes.
#pragma once

#include <vector>

#include "turns.h"

namespace smartkv::binding {

struct PagedInput {
  PagedKV cache;               // what the kernels get
  Tensor block_table, k_mean;  // own what `cache` points to, where it had to be made contiguous
  TurnsInput turns;
};

// Everything but the page ids, which pages will be touched being known to the op alone.
PagedInput paged_input(const Place& place, const std::vector<Tensor>& pools,
                       const Tensor& block_table, const Tensor& cache_seqlens, const Tensor& k_mean,
                       const std::vector<int64_t>& tier_bits, Levels levels, DType raw_dtype,
                       const std::optional<Tensor>& k_turns,
                       const std::optional<Tensor>& turn_steps,
                       const std::optional<Tensor>& k_weights);

// A list is the pages of one (sequence, head, tier): list = (b * num_kv_heads + h) * num_tiers + t.
inline int64_t num_lists(const PagedKV& cache) {
  return int64_t{cache.batch} * cache.num_kv_heads * cache.num_tiers;
}

// block_table must hold pages of the pool at [first, last) of the list, and have that many entries.
void check_pages(const PagedInput& input, int64_t list, int64_t first, int64_t last);

inline int64_t pages_for(int64_t records) { return (records + PAGE_SIZE - 1) / PAGE_SIZE; }

}  // namespace smartkv::binding
