#include "attention_plan.h"

#include <algorithm>
#include <vector>

#include "smartkv/layout.h"

namespace smartkv {

namespace {

int64_t tier_length(const DecodeAttentionParams& p, int64_t head, int tier) {
  if (tier == p.cache.num_tiers) return p.window_len;
  return p.cache.cache_seqlens[head * p.cache.num_tiers + tier];
}

int64_t tier_tiles(const DecodeAttentionParams& p, int64_t head, int tier) {
  return (tier_length(p, head, tier) + PAGE_SIZE - 1) / PAGE_SIZE;
}

}  // namespace

int64_t tile_cost(const DecodeAttentionParams& p, int tier) {
  const int64_t values = int64_t{2} * PAGE_SIZE * p.cache.head_dim;
  const bool is_window = tier == p.cache.num_tiers;
  const int64_t bytes = is_window ? values * dtype_size(p.q.dtype) : p.cache.page_bytes[tier];
  return bytes + values / 4;
}

TileRef tile_at(const DecodeAttentionParams& p, int64_t head, int64_t tile) {
  int tier = 0;
  for (; tier < p.cache.num_tiers; ++tier) {
    const int64_t tiles = tier_tiles(p, head, tier);
    if (tile < tiles) break;
    tile -= tiles;
  }
  const int64_t left = tier_length(p, head, tier) - tile * PAGE_SIZE;
  return {tier, tile, static_cast<int>(std::min<int64_t>(left, PAGE_SIZE))};
}

PageWalk::PageWalk(const DecodeAttentionParams& params, const Piece* begin, const Piece* end)
    : params_(&params), piece_(begin), end_(end) {
  if (piece_ != end_) start_piece();
}

void PageWalk::start_piece() {
  at_ = tile_at(*params_, piece_->head, piece_->begin);
  left_ = piece_->end - piece_->begin;
}

PageRef PageWalk::next() {
  const PagedKV& cache = params_->cache;
  while (piece_ != end_) {
    if (left_ == 0 || at_.tier == cache.num_tiers) {
      if (++piece_ != end_) start_piece();
    } else if (at_.index >= tier_tiles(*params_, piece_->head, at_.tier)) {
      ++at_.tier;
      at_.index = 0;
    } else {
      --left_;
      const int64_t list = piece_->head * cache.num_tiers + at_.tier,
                    bytes = cache.page_bytes[at_.tier];
      return {
          cache.pools[at_.tier] + cache.block_table[list * cache.max_pages + at_.index++] * bytes,
          bytes};
    }
  }
  return {nullptr, 0};
}

// Walks the tiles of all heads once and closes a part whenever its share of the cost is reached.
class AttentionPlan::Planner {
 public:
  Planner(const DecodeAttentionParams& params, int64_t parts) : params_(params), parts_(parts) {
    for (int64_t head = 0; head < num_heads(); ++head) {
      for (int t = 0; t <= params.cache.num_tiers; ++t) {
        const int64_t tiles = tier_tiles(params, head, t);
        total_ += tiles * tile_cost(params, t);
        if (t < params.cache.num_tiers) bytes_ += tiles * params.cache.page_bytes[t];
      }
    }
    part_begin.push_back(0);
    for (int64_t head = 0; head < num_heads(); ++head) add_head(head);
    while (static_cast<int64_t>(part_begin.size()) <= parts_) close_part();
  }

  std::vector<Piece> pieces;
  std::vector<int64_t> part_begin;
  std::vector<SplitHead> splits;
  int64_t num_split_pieces = 0;
  int64_t max_tiles = 0;
  double bytes_per_cost() const {
    return total_ == 0 ? 0 : static_cast<double>(bytes_) / static_cast<double>(total_);
  }

 private:
  int64_t num_heads() const { return int64_t{params_.cache.batch} * params_.cache.num_kv_heads; }
  int64_t part() const { return static_cast<int64_t>(part_begin.size()) - 1; }
  bool is_last_part() const { return part() + 1 >= parts_; }

  void close_part() { part_begin.push_back(static_cast<int64_t>(pieces.size())); }

  void add_head(int64_t head) {
    const auto first_piece = static_cast<int64_t>(pieces.size());
    int64_t begin = 0, tile = 0;
    for (int t = 0; t <= params_.cache.num_tiers; ++t) {
      const int64_t cost = tile_cost(params_, t);
      int64_t left = tier_tiles(params_, head, t);
      while (left > 0) {
        const int64_t share = total_ * (part() + 1) / parts_ - done_;
        const int64_t room = is_last_part() ? left : (share + cost - 1) / cost;
        const int64_t taken = std::clamp<int64_t>(room, 0, left);
        done_ += taken * cost;
        tile += taken;
        left -= taken;
        if (left == 0) break;
        if (tile > begin) pieces.push_back({head, begin, tile, part()});
        begin = tile;
        close_part();
      }
    }
    max_tiles = std::max(max_tiles, tile);
    if (tile > begin || tile == 0) pieces.push_back({head, begin, tile, part()});
    const auto count = static_cast<int64_t>(pieces.size()) - first_piece;
    if (count == 1) return;
    splits.push_back({head, first_piece, count});
    for (int64_t i = 0; i < count; ++i) {
      pieces[first_piece + i].state = parts_ + num_split_pieces++;
    }
  }

  const DecodeAttentionParams& params_;
  int64_t parts_;
  int64_t total_ = 0, bytes_ = 0, done_ = 0;
};

AttentionPlan::AttentionPlan(const DecodeAttentionParams& params, int64_t parts)
    : parts(parts), planner_(new Planner(params, parts)) {
  pieces = planner_->pieces.data();
  part_begin = planner_->part_begin.data();
  splits = planner_->splits.data();
  num_splits = static_cast<int64_t>(planner_->splits.size());
  num_states = parts + planner_->num_split_pieces;
  max_tiles = planner_->max_tiles;
  bytes_per_cost = planner_->bytes_per_cost();
}

AttentionPlan::~AttentionPlan() { delete planner_; }

}  // namespace smartkv
