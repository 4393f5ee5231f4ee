#include "paged.h"

#include "smartkv/layout.h"

namespace smartkv::binding {

namespace {

constexpr uintptr_t PAGE_ALIGNMENT = 64;

// "[batch, head, tier]", for messages.
std::string list_name(const PagedKV& cache, int64_t list) {
  const int64_t t = list % cache.num_tiers;
  const int64_t head = list / cache.num_tiers;
  std::ostringstream text;
  text << '[' << head / cache.num_kv_heads << ", " << head % cache.num_kv_heads << ", " << t << ']';
  return text.str();
}

void fill_tiers(PagedKV& cache, const std::vector<int64_t>& tier_bits) {
  check(!tier_bits.empty() && tier_bits.size() <= MAX_TIERS, "tier_bits must have 1 to ", MAX_TIERS,
        " entries; got ", tier_bits.size());
  cache.num_tiers = static_cast<int>(tier_bits.size());
  for (int t = 0; t < cache.num_tiers; ++t) {
    cache.tier_bits[t] = check_tier(tier_bits[t]);
    check(t == 0 || bits_of_pair(cache.tier_bits[t]) > bits_of_pair(cache.tier_bits[t - 1]),
          "tier_bits must ascend by the bits of keys and values (302: 3 and 2); got ", tier_bits[t],
          " after ", tier_bits[t > 0 ? t - 1 : 0]);
  }
}

void fill_pools(PagedInput& input, const Place& place, const std::vector<Tensor>& pools) {
  PagedKV& cache = input.cache;
  check(pools.size() == static_cast<size_t>(cache.num_tiers),
        "pools must have one tensor per entry of tier_bits (", cache.num_tiers, "); got ",
        pools.size());
  for (int t = 0; t < cache.num_tiers; ++t) {
    const Tensor& pool = pools[t];
    const char* const names[MAX_TIERS] = {"pools[0]", "pools[1]", "pools[2]", "pools[3]",
                                          "pools[4]", "pools[5]", "pools[6]"};
    const char* name = names[t];
    place.check(pool, name);
    check_dtype(pool, name, ScalarType::Byte);
    check_dim(pool, name, 2, "(num_pages, page_bytes)");
    const int64_t page_bytes =
        page_layout(cache.tier_bits[t], cache.head_dim, dtype_size(cache.raw_dtype)).page_bytes;
    check(pool.size(1) == page_bytes, name, " must have pages of ", page_bytes, " bytes (tier ",
          cache.tier_bits[t], ", head_dim ", cache.head_dim, "); got ", pool.size(1));
    check(pool.is_contiguous(), name, " must be contiguous");
    cache.pools[t] = static_cast<uint8_t*>(pool.data_ptr());
    check(reinterpret_cast<uintptr_t>(cache.pools[t]) % PAGE_ALIGNMENT == 0, name,
          " must start at an address that is a multiple of ", PAGE_ALIGNMENT);
    cache.page_bytes[t] = page_bytes;
    cache.num_pages[t] = pool.size(0);
  }
}

void check_lengths(const PagedKV& cache) {
  const int64_t most = cache.max_pages * PAGE_SIZE;
  for (int64_t list = 0; list < num_lists(cache); ++list) {
    const int64_t length = cache.cache_seqlens[list];
    if (length < 0 || length > most) {
      check(false, "cache_seqlens", list_name(cache, list), " must be in [0, ", most,
            "], 64 per page of block_table; got ", length);
    }
  }
}

}  // namespace

PagedInput paged_input(const Place& place, const std::vector<Tensor>& pools,
                       const Tensor& block_table, const Tensor& cache_seqlens, const Tensor& k_mean,
                       const std::vector<int64_t>& tier_bits, Levels levels, DType raw_dtype,
                       const std::optional<Tensor>& k_turns,
                       const std::optional<Tensor>& turn_steps,
                       const std::optional<Tensor>& k_weights) {
  PagedKV cache{};
  fill_tiers(cache, tier_bits);
  check_dim(block_table, "block_table", 4, "(batch, num_kv_heads, num_tiers, max_pages)");
  const auto sizes = block_table.sizes();
  cache.batch = check_int32(sizes[0], "batch", 1);
  cache.num_kv_heads = check_int32(sizes[1], "num_kv_heads", 1);
  cache.max_pages = sizes[3];
  check_int32(sizes[3] * PAGE_SIZE, "max_pages * 64", 0);
  check_dim(k_mean, "k_mean", 3, "(batch, num_kv_heads, head_dim)");
  cache.head_dim = check_head_dim(k_mean.size(2));
  cache.raw_dtype = raw_dtype;
  cache.levels = levels;
  PagedInput input{
      cache,
      dense_input(place, block_table, "block_table", ScalarType::Int,
                  {sizes[0], sizes[1], cache.num_tiers, sizes[3]},
                  "(batch, num_kv_heads, num_tiers, max_pages)"),
      dense_input(place, k_mean, "k_mean", ScalarType::Float, {sizes[0], sizes[1], cache.head_dim},
                  "(batch, num_kv_heads, head_dim)"),
      turns_input(place, k_turns, turn_steps, k_weights, sizes[0], sizes[1], cache.head_dim)};
  input.cache.turns = input.turns.turns;
  input.cache.block_table = input.block_table.const_data_ptr<int32_t>();
  input.cache.k_mean = input.k_mean.const_data_ptr<float>();
  fill_pools(input, place, pools);

  const char* const name = "cache_seqlens";
  place.check(cache_seqlens, name);
  check_dtype(cache_seqlens, name, ScalarType::Int);
  check_shape(cache_seqlens, name, {sizes[0], sizes[1], cache.num_tiers},
              "(batch, num_kv_heads, num_tiers)");
  check(cache_seqlens.is_contiguous(), name, " must be contiguous");
  input.cache.cache_seqlens = static_cast<int32_t*>(cache_seqlens.data_ptr());
  if (place.has_readable_values()) check_lengths(input.cache);
  return input;
}

void check_pages(const PagedInput& input, int64_t list, int64_t first, int64_t last) {
  const PagedKV& cache = input.cache;
  if (last > cache.max_pages) {
    check(false, "block_table", list_name(cache, list), " must have room for ", last,
          " pages; max_pages is ", cache.max_pages);
  }
  const int64_t num_pages = cache.num_pages[list % cache.num_tiers];
  const int32_t* pages = cache.block_table + list * cache.max_pages;
  for (int64_t i = first; i < last; ++i) {
    if (pages[i] < 0 || pages[i] >= num_pages) [[unlikely]] {
      check(false, "block_table", list_name(cache, list), " entry ", i, " must be in [0, ",
            num_pages, "), a page of the tier's pool; got ", pages[i]);
    }
  }
}

}  // namespace smartkv::binding
