// What a thread waits for, in words.
#pragma once

#include <cstdio>
#include <cstring>
#include <string>

#include "simt/block.h"

namespace simt {

inline const char* name_of(Op op) {
  constexpr const char* NAMES[] = {
      "exit",
      "an atomic",
      "__syncthreads",
      "__syncthreads_count",
      "__syncthreads_and",
      "__syncthreads_or",
      "__syncwarp",
      "__shfl_sync",
      "__shfl_up_sync",
      "__shfl_down_sync",
      "__shfl_xor_sync",
      "__ballot_sync",
      "__any_sync",
      "__all_sync",
      "a warp operation",
  };
  return NAMES[static_cast<int>(op)];
}

inline bool is_barrier(Op op) { return op >= Op::SYNCTHREADS && op <= Op::SYNCTHREADS_OR; }
inline bool is_shuffle(Op op) { return op >= Op::SHFL && op <= Op::SHFL_XOR; }

inline bool same_place(const std::source_location& a, const std::source_location& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

inline std::string hex(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

inline std::string place(const std::source_location& where) {
  const std::string path = where.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

inline std::string describe(const Request& request) {
  if (request.op == Op::EXIT) return "exited";
  const char* const name = request.name != nullptr ? request.name : name_of(request.op);
  std::string text = std::string("waits in ") + name;
  if (!is_barrier(request.op)) text += " with mask " + hex(request.mask);
  return text + " at " + place(request.where);
}

// The lane that a shuffle reads, as in the PTX manual; a lane whose source is out of reach reads
// itself.
inline int source_lane(const Request& request, int lane) {
  const int first = lane & ~(request.width - 1), last = first + request.width - 1;
  switch (request.op) {
    case Op::SHFL:
      return first | (request.operand & (request.width - 1));
    case Op::SHFL_UP:
      return lane - request.operand >= first ? lane - request.operand : lane;
    case Op::SHFL_DOWN:
      return lane + request.operand <= last ? lane + request.operand : lane;
    default:
      return (lane ^ request.operand) <= last ? lane ^ request.operand : lane;
  }
}

}  // namespace simt
