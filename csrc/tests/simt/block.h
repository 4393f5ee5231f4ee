// Runs a launch on the CPU: blocks one after another, the threads of a block as fibers in turns.
// A thread gives up its turn where it waits for others (barriers, shuffles, votes) and at atomics;
// a seed decides who is next, so that every run can be repeated. Between these points a thread is
// never interrupted: races are seen as a wrong order of whole pieces, not of single accesses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>

#include "simt/vector_types.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace simt {

constexpr int WARP_SIZE = 32;
constexpr unsigned MAX_THREADS = 1024;

// What a GPU would hang on or answer with garbage: says block, seed, and who waits where.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Op {
  EXIT,
  YIELD,
  SYNCTHREADS,
  SYNCTHREADS_COUNT,
  SYNCTHREADS_AND,
  SYNCTHREADS_OR,
  SYNCWARP,
  SHFL,
  SHFL_UP,
  SHFL_DOWN,
  SHFL_XOR,
  BALLOT,
  ANY,
  ALL,
  WARP,  // what `run` does with the operands of all lanes
};

// Why a thread gave up its turn.
struct Request {
  Op op;
  std::source_location where;
  unsigned mask;   // collectives of a warp: the lanes that take part
  uint64_t value;  // what is shuffled, or a predicate
  int operand;     // shuffles: lane, distance or lane mask
  int width;
  // WARP: called once, with the operands of the 32 lanes; null for a lane that is not in the mask.
  void (*run)(void* const* lanes) = nullptr;
  void* lane_operand = nullptr;
  const char* name = nullptr;
  bool whole_warp = false;  // it is an error unless all 32 lanes take part
};

// Called by a thread. Returns once all who must meet have met, with what this thread gets from it.
uint64_t meet(const Request& request);

// Shared memory of the running block under a key, 128-byte aligned. New for every block, and full
// of 0xff: NaN as a float of any size, -1 as an integer.
void* shared_memory(const void* key, size_t bytes);
void* dynamic_shared_memory();

// Which thread of the block runs, and a number that no other block of the process has.
int thread_in_block();
uint64_t block_serial();

// Ends the launch with an Error that says where; called by a thread. The thread is never resumed,
// so nothing on its stack is destroyed: `what` is no std::string, which would leak.
[[noreturn]] void misuse(const char* what, const std::source_location& where);

// The schedule of the launches from now on.
void set_seed(uint64_t seed);

// Calls thread() for every thread of the grid. Throws Error.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread);

}  // namespace simt
