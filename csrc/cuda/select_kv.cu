// select_kv on CUDA: a block per group sorts the tokens, buys pages and gives the tokens their
// tiers, bit for bit as the CPU (csrc/cpu/select_kv.cpp): all that is in double is in its order.
#include <algorithm>

#include "cuda_ops.h"
#include "scalar.h"
#include "smartkv/upgrade_path.h"

namespace smartkv {
namespace {

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / WARP;
constexpr int DIGITS = 256;
constexpr int SHARED_SLOTS = 2048;  // of heads * num_tiers; more are in the workspace

// Memory of one group. A token is its tie = (n - 1 - i) * heads + h: newest first, lower heads
// before higher.
struct Group {
  uint32_t *keys[2], *ties[2];  // [heads * n]
  uint32_t* passed;             // [heads * n]: tokens without a place after the first round
  double* weights;              // [blocks of 64 ranks]
  uint8_t* levels;              // [blocks]: upgrades taken
  int32_t* slots;               // [heads, MAX_TIERS]: free records in the head's open page
};

struct Pages {
  int64_t of_tier[MAX_TIERS];
};

constexpr int64_t padded(int64_t bytes) { return (bytes + 15) / 16 * 16; }

int64_t group_bytes(const SelectParams& p) {
  const int64_t tokens = p.heads * p.n, blocks = (tokens + PAGE_SIZE - 1) / PAGE_SIZE;
  return 5 * padded(4 * tokens) + padded(8 * blocks) + padded(blocks) +
         padded(4 * p.heads * MAX_TIERS);
}

__device__ __forceinline__ Group group_at(const SelectParams& p, unsigned char* memory) {
  const int64_t tokens = p.heads * p.n, blocks = (tokens + PAGE_SIZE - 1) / PAGE_SIZE;
  const auto take = [&](int64_t bytes) { return (memory += padded(bytes)) - padded(bytes); };
  const auto words = [&] { return reinterpret_cast<uint32_t*>(take(4 * tokens)); };
  Group group{};
  for (int i = 0; i < 2; ++i) group.keys[i] = words();
  for (int i = 0; i < 2; ++i) group.ties[i] = words();
  group.passed = words();
  group.weights = reinterpret_cast<double*>(take(8 * blocks));
  group.levels = take(blocks);
  group.slots = reinterpret_cast<int32_t*>(take(4 * p.heads * MAX_TIERS));
  return group;
}

// Kernels

__device__ __forceinline__ int64_t place_of(const SelectParams& p, uint32_t tie) {
  const int64_t heads = p.heads;
  return (blockIdx.x * heads + tie % heads) * p.n + (p.n - 1 - tie / heads);
}

// Highest tier that the token may have.
__device__ __forceinline__ int reach_of(const SelectParams& p, uint32_t tie) {
  return min(int{p.current[place_of(p, tie)]}, p.num_tiers - 1);
}

// Candidates in the order of their ties, and how many may have each tier. Whole block; begins with
// a barrier.
__device__ __forceinline__ int collect(const SelectParams& p, const Group& group,
                                       int (&counts)[WARPS], int (&eligible)[MAX_TIERS]) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  const int64_t tokens = p.heads * p.n;
  int total = 0;
  for (int64_t first = 0; first < tokens; first += THREADS) {
    const int64_t tie = first + threadIdx.x;
    bool exists = is_within(tie, tokens);
    unsigned key = 0;
    if (exists) {
      const int64_t at = place_of(p, static_cast<uint32_t>(tie));
      const float score = p.scores[at] + 0.0f;  // -0 ranks like 0
      // Written so that NaN, too, is not a candidate.
      exists = p.current[at] >= 0 && score > -INFINITY;
      const unsigned word = __float_as_uint(score);
      key = ~((word & 0x80000000u) != 0 ? ~word : word | 0x80000000u);
      p.tiers[at] = -1;
    }
    const unsigned lanes = __ballot_sync(ALL_LANES, exists);
    if (lane == 0) counts[warp] = __popc(lanes);
    __syncthreads();
    int rank = total + __popc(lanes & ((1u << lane) - 1));
    for (int w = 0; w < WARPS; ++w) {
      if (w < warp) rank += counts[w];
      total += counts[w];
    }
    __syncthreads();  // the counts have been read
    if (!exists) continue;
    group.keys[0][rank] = key;
    group.ties[0][rank] = static_cast<uint32_t>(tie);
    for (int t = 0; t <= reach_of(p, static_cast<uint32_t>(tie)); ++t) atomicAdd(&eligible[t], 1);
  }
  return total;
}

struct SortScratch {
  int bases[DIGITS];
  int counts[WARPS][DIGITS];
};

// Stable sort by key: four passes over digits of 8 bits, from keys[0] back to keys[0]. Whole block;
// each pass begins with a barrier.
__device__ __forceinline__ void sort(const Group& group, int count, SortScratch& scratch) {
  const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  for (int pass = 0; pass < 4; ++pass) {
    const uint32_t *const keys = group.keys[pass % 2], *const ties = group.ties[pass % 2];
    uint32_t *const to_keys = group.keys[1 - pass % 2], *const to_ties = group.ties[1 - pass % 2];
    const auto digit_of = [&](uint32_t key) { return key >> 8 * pass & (DIGITS - 1); };
    if (threadIdx.x < DIGITS) scratch.bases[threadIdx.x] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += THREADS) {
      atomicAdd(&scratch.bases[digit_of(keys[i])], 1);
    }
    __syncthreads();
    if (warp == 0) {  // counts become the places of the first of each digit
      int before = 0;
      for (int first = 0; first < DIGITS; first += WARP) {
        const int mine = scratch.bases[first + lane];
        int sum = mine;
        for (int distance = 1; distance < WARP; distance *= 2) {
          const int other = __shfl_up_sync(ALL_LANES, sum, distance);
          if (lane >= distance) sum += other;
        }
        scratch.bases[first + lane] = before + sum - mine;
        before += __shfl_sync(ALL_LANES, sum, WARP - 1);
      }
    }
    for (int first = 0; first < count; first += THREADS) {
      const int i = first + static_cast<int>(threadIdx.x);
      const bool exists = is_within(i, count);
      for (int d = lane; d < DIGITS; d += WARP) scratch.counts[warp][d] = 0;
      __syncwarp();  // the counts are clear
      const unsigned key = exists ? keys[i] : 0, tie = exists ? ties[i] : 0;
      const unsigned digit = exists ? digit_of(key) : DIGITS;
      const unsigned peers = __match_any_sync(ALL_LANES, digit);
      const int rank = __popc(peers & ((1u << lane) - 1));
      if (exists && rank == 0) scratch.counts[warp][digit] = __popc(peers);
      __syncthreads();
      if (threadIdx.x < DIGITS) {
        int base = scratch.bases[threadIdx.x];
        for (int w = 0; w < WARPS; ++w) {
          const int own = scratch.counts[w][threadIdx.x];
          scratch.counts[w][threadIdx.x] = base;
          base += own;
        }
        scratch.bases[threadIdx.x] = base;
      }
      __syncthreads();
      if (exists) {
        const int to = scratch.counts[warp][digit] + rank;
        to_keys[to] = key;
        to_ties[to] = tie;
      }
      __syncwarp();  // the places have been read
    }
  }
}

// What the ranks of a block of 64 are worth, summed one by one. Whole block.
__device__ __forceinline__ void weigh_blocks(const SelectParams& p, const Group& group, int count) {
  const int blocks = (count + PAGE_SIZE - 1) / PAGE_SIZE;
  for (int block = threadIdx.x; block < blocks; block += THREADS) {
    double weight = 0;
    const int end = min((block + 1) * PAGE_SIZE, count);
    for (int rank = block * PAGE_SIZE; rank < end; ++rank) {
      weight = __dadd_rn(weight, 1.0 / __dadd_rn(static_cast<double>(rank), p.zipf_offset));
    }
    group.weights[block] = weight;
    group.levels[block] = 0;
  }
  __syncthreads();
}

// Pages to buy per tier, by one thread. Weights fall from block to block: the upgrades of each step
// are sorted as they are, and all of them by merging the steps.
__device__ __forceinline__ void plan_pages(const UpgradePath& path, const Group& group, int count,
                                           const int (&eligible)[MAX_TIERS], int64_t budget,
                                           Pages& pages) {
  const int blocks = (count + PAGE_SIZE - 1) / PAGE_SIZE;
  int next[MAX_TIERS] = {}, limit[MAX_TIERS] = {}, taken_up[MAX_TIERS] = {};
  double gain[MAX_TIERS] = {};
  for (int t = 0; t < MAX_TIERS; ++t) {
    pages.of_tier[t] = 0;
    limit[t] = (eligible[t] + (eligible[t] == count ? PAGE_SIZE - 1 : 0)) / PAGE_SIZE;
  }
  int64_t least = INT64_MAX;
  const auto value_of = [&](int step) {
    return next[step] < blocks ? __dmul_rn(group.weights[next[step]], path[step].slope) : -1.0;
  };
  for (int step = 0; step < path.count; ++step) {
    gain[step] = value_of(step);
    least = min(least, path[step].bytes);
  }
  while (budget >= least) {
    int best = -1;
    for (int step = 0; step < path.count; ++step) {
      if (next[step] == blocks) continue;
      // Equal gains: the lower block first, then the lower step.
      if (best < 0 || gain[step] > gain[best] ||
          (gain[step] == gain[best] && next[step] < next[best])) {
        best = step;
      }
    }
    if (best < 0) break;
    const int block = next[best]++;
    gain[best] = value_of(best);
    bool fits = group.levels[block] == best && path[best].bytes <= budget;
    const int from = path.from_tier(best), to = path[best].tier;
    for (int t = from; t <= to; ++t) fits = fits && taken_up[t] < limit[t];
    if (!fits) continue;
    budget -= path[best].bytes;
    group.levels[block] = static_cast<uint8_t>(best + 1);
    for (int t = from; t <= to; ++t) ++taken_up[t];
    if (best > 0) --pages.of_tier[path[best - 1].tier];
    ++pages.of_tier[to];
  }
}

__device__ __forceinline__ int64_t stock_bytes(const SelectParams& p, const Pages& pages) {
  int64_t bytes = 0;
  for (int t = 0; t < p.num_tiers; ++t) bytes += pages.of_tier[t] * p.page_bytes[t];
  return bytes;
}

// Gives tokens places in their order: the highest tier within reach that has room, opening a page
// of the stock where the head's own is full. One warp, 32 tokens at a time: all tokens before the
// first that has to open a page take theirs at once. Returns how many went to `passed`.
__device__ __forceinline__ int place(const SelectParams& p, const uint32_t* ties, int count,
                                     int32_t* slots, Pages& pages, uint32_t* passed) {
  const int lane = threadIdx.x % WARP;
  int num_passed = 0;
  for (int first = 0; first < count; first += WARP) {
    const bool exists = is_within(first + lane, count);
    const uint32_t tie = exists ? ties[first + lane] : 0;
    const int head = static_cast<int>(tie % p.heads), reach = exists ? reach_of(p, tie) : -1;
    int chosen = -1;
    unsigned left = __ballot_sync(ALL_LANES, exists);
    while (left != 0) {
      const bool waits = left >> lane & 1;
      int tier = -1, room = 0;
      if (waits) {
        for (tier = reach; tier >= 0; --tier) {
          room = slots[head * MAX_TIERS + tier];
          if (room > 0 || pages.of_tier[tier] > 0) break;
        }
      }
      const unsigned list = tier >= 0 ? head * MAX_TIERS + tier : 0xffffffffu;
      const unsigned peers = __match_any_sync(ALL_LANES, list);
      const int rank = __popc(peers & ((1u << lane) - 1));
      const unsigned stuck = __ballot_sync(ALL_LANES, tier >= 0 && rank >= room);
      const int stop = stuck != 0 ? __ffs(static_cast<int>(stuck)) - 1 : WARP;
      const unsigned before = stop < WARP ? (1u << stop) - 1 : ALL_LANES;
      __syncwarp();  // all have read their slots
      if (tier >= 0 && lane < stop) {
        chosen = tier;
        if (rank == 0) slots[list] = room - __popc(peers & before);
      }
      __syncwarp();  // the slots are taken
      left &= ~before;
      if (stop == WARP) break;
      // All slots of this list are taken now. Without a page to open it looks for a lower tier.
      const int tier_of_stop = __shfl_sync(ALL_LANES, tier, stop);
      if (pages.of_tier[tier_of_stop] > 0) {
        --pages.of_tier[tier_of_stop];
        if (lane == stop) slots[list] = PAGE_SIZE;
      }
      __syncwarp();
    }
    if (chosen >= 0) p.tiers[place_of(p, tie)] = static_cast<int8_t>(chosen);
    const unsigned without = __ballot_sync(ALL_LANES, exists && chosen < 0);
    if (exists && chosen < 0) passed[num_passed + __popc(without & ((1u << lane) - 1))] = tie;
    num_passed += __popc(without);
  }
  __syncwarp();  // `passed` is read by other lanes
  return num_passed;
}

// grid_shape: [groups].
__global__ void __launch_bounds__(THREADS, 1)
    select_kv_kernel(SelectParams p, UpgradePath path, unsigned char* workspace,
                     int64_t bytes_of_group) {
  SMARTKV_SHARED(scratch, SortScratch);
  SMARTKV_SHARED(counts, int[WARPS]);
  SMARTKV_SHARED(eligible, int[MAX_TIERS]);
  SMARTKV_SHARED(pages, Pages);
  SMARTKV_SHARED(shared_slots, int32_t[SHARED_SLOTS]);
  const Group group = group_at(p, workspace + blockIdx.x * bytes_of_group);
  const int64_t budget = p.budgets[blockIdx.x], num_slots = p.heads * MAX_TIERS;
  int32_t* const slots = num_slots <= SHARED_SLOTS ? shared_slots : group.slots;
  if (threadIdx.x < MAX_TIERS) eligible[threadIdx.x] = 0;
  for (int64_t i = threadIdx.x; i < num_slots; i += THREADS) slots[i] = 0;
  const int count = collect(p, group, counts, eligible);
  sort(group, count, scratch);
  weigh_blocks(p, group, count);
  if (threadIdx.x >= WARP) return;
  if (threadIdx.x == 0) plan_pages(path, group, count, eligible, budget, pages);
  __syncwarp();
  Pages stock = pages;
  int64_t spare = budget - stock_bytes(p, stock);
  const int num_passed = place(p, group.ties[0], count, slots, stock, group.passed);
  // Tokens that may not rise again can leave pages unused: turn those into lowest-tier pages for
  // the next in rank.
  spare += stock_bytes(p, stock);
  stock = {};
  stock.of_tier[0] = spare / p.page_bytes[0];
  place(p, group.passed, num_passed, slots, stock, group.ties[1]);
}

}  // namespace

// Kernel launchers

size_t select_kv_workspace(const SelectParams& p) { return p.groups * group_bytes(p); }

const char* select_kv_cuda(const SelectParams& p, void* workspace, void* stream) {
  if (p.groups == 0 || p.heads == 0 || p.n == 0) return nullptr;
  SMARTKV_LAUNCH(select_kv_kernel, static_cast<unsigned>(p.groups), THREADS, 0,
                 static_cast<cudaStream_t>(stream), p, make_upgrade_path(p),
                 static_cast<unsigned char*>(workspace), group_bytes(p));
  return launch_error();
}

}  // namespace smartkv
