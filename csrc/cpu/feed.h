// What is fetched from memory while other pages are worked on. Lines are asked for in the order of
// the pages and one at a time: of a burst the processor drops what its queue of misses cannot hold.
#pragma once

namespace smartkv::SMARTKV_ISA {

// Neighbouring lines that a product of a known number of steps fetches on its way, one or less per
// step.
struct Lines {
  const uint8_t* at;
  int64_t stride;  // bytes, at most a line

  SMARTKV_INLINE void step() {
    __builtin_prefetch(at);
    at += stride;
  }
  void walk(int steps) {
    for (int i = 0; i < steps; ++i) step();
  }
};

SMARTKV_INLINE Lines no_lines(const void* at) { return {static_cast<const uint8_t*>(at), 0}; }

// Memory should be busy all the time, but the arithmetic of a page takes much longer per byte with
// few bits than with many. So what is fetched is spread over the time of the whole walk, within two
// bounds: at least the tiles that follow at once, at most what fits into a second-level cache.
class Feed {
 public:
  // `ahead`: tiles that are worked on together; bytes_per_cost: of the whole walk.
  Feed(const DecodeAttentionParams& p, const Piece* begin, const Piece* end, int ahead,
       double bytes_per_cost)
      : walk_(p, begin, end),
        num_tiers_(p.cache.num_tiers),
        ahead_(ahead),
        page_bytes_(p.cache.page_bytes) {
    for (int t = 0; t <= num_tiers_; ++t) {
      share_[t] = static_cast<int64_t>(bytes_per_cost * static_cast<double>(tile_cost(p, t)));
    }
    // The first pages are read before anything could have been fetched.
    for (int i = 0; i < ahead; ++i) fetched_ += walk_.next().bytes;
  }

  // A tile of this tier is going to be worked on.
  SMARTKV_INLINE void open(int tier) {
    due_ += share_[tier];
    if (tier == num_tiers_) return;
    opened_ += page_bytes_[tier];
    lead_ = ahead_ * page_bytes_[tier];
  }

  // No query sees anything of a tile of this tier: none of its page is worth a line.
  SMARTKV_INLINE void pass(int tier) {
    if (tier == num_tiers_) return;
    opened_ += page_bytes_[tier];
    while (fetched_ < opened_) {
      if (at_ == end_ && !start_page()) return;
      fetched_ += end_ - at_;
      at_ = end_;
    }
  }

  // All tiles of a batch have been opened; so many products follow.
  void begin(int products) {
    const int64_t lead = fetched_ - opened_;
    const int64_t least = lead_ - lead, most = MOST - lead;
    int64_t bytes = due_ < most ? due_ : most;
    if (bytes < least) bytes = least;
    due_ = 0;
    lines_ = bytes <= 0 ? 0 : static_cast<int>(bytes / (64 * products)) + 1;
  }

  // What to fetch in the next product, which has `steps` steps. Lines beyond those, and the rest of
  // a page that is nearly fetched, are asked for at once.
  Lines take(int steps, const void* fallback) {
    int lines = lines_;
    while (lines > 0) {
      if (at_ == end_ && !start_page()) break;
      const auto left = static_cast<int>((end_ - at_) / 64);
      int count = left < lines ? left : lines;
      const bool is_last = 2 * count >= lines;
      lines -= count;
      fetched_ += 64 * count;
      for (; count > (is_last ? steps : 0); --count, at_ += 64) __builtin_prefetch(at_);
      if (is_last) {
        const uint8_t* first = at_;
        at_ += 64 * count;
        return {first, (64 * count + steps - 1) / steps};
      }
    }
    return no_lines(fallback);
  }

 private:
  bool start_page() {
    const PageRef page = walk_.next();
    at_ = page.page;
    end_ = at_ + page.bytes;
    return at_ != nullptr;
  }

  static constexpr int64_t MOST = 256 << 10;

  PageWalk walk_;
  int num_tiers_, ahead_;
  const int64_t* page_bytes_;
  int64_t share_[MAX_TIERS + 1];  // bytes to fetch in the time of a tile; the window is the last
  int64_t due_ = 0, lead_ = 0, opened_ = 0, fetched_ = 0;  // bytes
  int lines_ = 0;                                          // per product
  const uint8_t *at_ = nullptr, *end_ = nullptr;
};

}  // namespace smartkv::SMARTKV_ISA
