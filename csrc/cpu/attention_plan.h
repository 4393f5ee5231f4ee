// How decode_attention is cut into parts of equal cost: over (batch, kv head) and, within a head,
// over the sequence. Compiled once, without ISA flags.
#pragma once

#include <cstdint>

#include "smartkv/params.h"

namespace smartkv {

// Up to 64 keys of one head: a page of a tier, or rows of the dense window (tier == num_tiers).
struct TileRef {
  int tier;
  int64_t index;
  int count;
};

// Tiles [begin, end) of one head, in the order of tiers, the window last.
struct Piece {
  int64_t head;
  int64_t begin, end;
  int64_t state;  // slot of its softmax state; pieces of split heads keep theirs until the merge
};

// Pieces of one head that are merged when all parts are done.
struct SplitHead {
  int64_t head;
  int64_t first_piece, num_pieces;
};

// Plain arrays: kernels compiled for one instruction set must not instantiate std templates.
class AttentionPlan {
 public:
  AttentionPlan(const DecodeAttentionParams& params, int64_t parts);
  ~AttentionPlan();
  AttentionPlan(const AttentionPlan&) = delete;
  AttentionPlan& operator=(const AttentionPlan&) = delete;

  int64_t parts;
  const Piece* pieces;
  const int64_t* part_begin;  // [parts + 1], first piece of each part
  const SplitHead* splits;
  int64_t num_splits;
  int64_t num_states;
  int64_t max_tiles;      // of a head
  double bytes_per_cost;  // of pages, over all tiles

 private:
  class Planner;
  Planner* planner_;
};

// Time of a tile, in units of bytes: measured, roughly.
int64_t tile_cost(const DecodeAttentionParams& params, int tier);

TileRef tile_at(const DecodeAttentionParams& params, int64_t head, int64_t tile);

struct PageRef {
  const uint8_t* page;  // null behind the last
  int64_t bytes;
};

// The pages of neighbouring pieces in the order in which they are read.
class PageWalk {
 public:
  PageWalk(const DecodeAttentionParams& params, const Piece* begin, const Piece* end);
  PageRef next();

 private:
  void start_piece();

  const DecodeAttentionParams* params_;
  const Piece *piece_, *end_;
  TileRef at_{};
  int64_t left_ = 0;  // tiles of the piece
};

}  // namespace smartkv
