// select_kv: evict or a tier for each token, under a byte budget (smartkv_ext/reference/select.py,
// which it equals bit for bit: all arithmetic is in double and in the reference's order).
#include "select_kv.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "smartkv/upgrade_path.h"

namespace smartkv {
namespace {

using Pages = int64_t[MAX_TIERS];

// Pages to buy per tier. eligible[t] tokens may take tier t: those not in a lower one already. A
// page above the reach of some tokens is bought only where the others fill it: an open slot in it
// is lost to the rest.
void plan_pages(const SelectParams& p, const UpgradePath& path, const Pages& eligible,
                int64_t budget, Pages& pages) {
  const int64_t num_tokens = eligible[0];
  Pages limit = {}, taken_up = {};  // blocks that may be, and are, at this tier or above
  for (int t = 0; t < p.num_tiers; ++t) {
    limit[t] = (eligible[t] + (eligible[t] == num_tokens ? PAGE_SIZE - 1 : 0)) / PAGE_SIZE;
  }
  const int64_t num_blocks = (num_tokens + PAGE_SIZE - 1) / PAGE_SIZE;
  std::vector<std::tuple<double, int64_t, int>> upgrades;
  upgrades.reserve(num_blocks * path.count);
  for (int64_t block = 0; block < num_blocks; ++block) {
    double weight = 0.0;
    const int64_t end = std::min((block + 1) * PAGE_SIZE, num_tokens);
    for (int64_t rank = block * PAGE_SIZE; rank < end; ++rank) {
      weight += 1.0 / (static_cast<double>(rank) + p.zipf_offset);
    }
    for (int step = 0; step < path.count; ++step) {
      upgrades.emplace_back(-weight * path[step].slope, block, step);
    }
  }
  std::sort(upgrades.begin(), upgrades.end());
  std::vector<int> level(num_blocks, 0);  // upgrades taken per block
  for (const auto& [gain, block, step] : upgrades) {
    const int from = path.from_tier(step);
    bool fits = level[block] == step && path[step].bytes <= budget;
    for (int t = from; t <= path[step].tier; ++t) fits = fits && taken_up[t] < limit[t];
    if (!fits) continue;
    budget -= path[step].bytes;
    level[block] = step + 1;
    for (int t = from; t <= path[step].tier; ++t) ++taken_up[t];
  }
  std::fill(pages, pages + MAX_TIERS, 0);
  for (const int taken : level) {
    if (taken > 0) ++pages[path[taken - 1].tier];
  }
}

// Candidates as sortable keys: best score first, then newest, then lower head. The high half is
// the score in an order-preserving integer form, inverted; the low half is (n - 1 - i) * heads + h.
std::vector<uint64_t> ranked_tokens(const SelectParams& p, int64_t group) {
  const float* const scores = p.scores + group * p.heads * p.n;
  const int8_t* const current = p.current + group * p.heads * p.n;
  std::vector<uint64_t> keys;
  keys.reserve(p.heads * p.n);
  for (int64_t h = 0; h < p.heads; ++h) {
    for (int64_t i = 0; i < p.n; ++i) {
      const float score = scores[h * p.n + i] + 0.0f;  // -0 ranks like 0
      // Written so that NaN, too, is not a candidate.
      if (current[h * p.n + i] < 0 || !(score > -INFINITY)) continue;
      uint32_t word;
      std::memcpy(&word, &score, sizeof word);
      word = (word & 0x80000000u) != 0 ? ~word : word | 0x80000000u;
      const uint64_t tie = static_cast<uint64_t>((p.n - 1 - i) * p.heads + h);
      keys.push_back(static_cast<uint64_t>(~word) << 32 | tie);
    }
  }
  std::sort(keys.begin(), keys.end());
  return keys;
}

// Gives tokens places, opening a page of the group's stock where a head's own is full.
struct Placer {
  const SelectParams& p;
  int64_t group;
  Pages pages = {};
  std::vector<int64_t> slots;  // [heads, MAX_TIERS]: free records in the head's open page

  Placer(const SelectParams& params, int64_t g)
      : p(params), group(g), slots(params.heads * MAX_TIERS, 0) {}

  static int64_t tie_of(uint64_t key) { return static_cast<int64_t>(key & 0xffffffffu); }

  // Index of the token in scores, current and tiers.
  int64_t place_of(uint64_t key) const {
    const int64_t tie = tie_of(key);
    return (group * p.heads + tie % p.heads) * p.n + (p.n - 1 - tie / p.heads);
  }

  // Highest tier not above the token's present one that still has room.
  bool place(uint64_t key) {
    const int64_t h = tie_of(key) % p.heads;
    const int64_t at = place_of(key);
    int64_t* const free_slots = &slots[h * MAX_TIERS];
    for (int t = std::min<int>(p.current[at], p.num_tiers - 1); t >= 0; --t) {
      if (free_slots[t] == 0 && pages[t] > 0) {
        --pages[t];
        free_slots[t] = PAGE_SIZE;
      }
      if (free_slots[t] > 0) {
        --free_slots[t];
        p.tiers[at] = static_cast<int8_t>(t);
        return true;
      }
    }
    return false;
  }

  int64_t stock_bytes() const {
    int64_t bytes = 0;
    for (int t = 0; t < p.num_tiers; ++t) bytes += pages[t] * p.page_bytes[t];
    return bytes;
  }
};

void select_group(const SelectParams& p, const UpgradePath& path, int64_t group) {
  std::fill_n(p.tiers + group * p.heads * p.n, p.heads * p.n, int8_t{-1});
  const std::vector<uint64_t> order = ranked_tokens(p, group);
  Placer placer(p, group);
  Pages eligible = {};
  for (const uint64_t key : order) {
    const int reach = std::min<int>(p.current[placer.place_of(key)], p.num_tiers - 1);
    for (int t = 0; t <= reach; ++t) ++eligible[t];
  }
  plan_pages(p, path, eligible, p.budgets[group], placer.pages);
  int64_t spare = p.budgets[group] - placer.stock_bytes();
  std::vector<uint64_t> passed;
  for (const uint64_t key : order) {
    if (!placer.place(key)) passed.push_back(key);
  }
  // Tokens that may not rise again can leave pages unused: turn those into lowest-tier pages for
  // the next in rank.
  spare += placer.stock_bytes();
  std::fill(placer.pages, placer.pages + MAX_TIERS, 0);
  placer.pages[0] = spare / p.page_bytes[0];
  for (const uint64_t key : passed) placer.place(key);
}

}  // namespace

void select_kv_cpu(const SelectParams& params, const Parallel& parallel) {
  struct Context {
    const SelectParams& params;
    UpgradePath path;
  } context{params, make_upgrade_path(params)};
  parallel.run(params.groups, &context, [](void* opaque, int64_t begin, int64_t end) {
    const Context& c = *static_cast<const Context*>(opaque);
    for (int64_t group = begin; group < end; ++group) select_group(c.params, c.path, group);
  });
}

}  // namespace smartkv
