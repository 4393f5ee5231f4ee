#include "simt/block.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "simt/describe.h"
#include "simt/fiber.h"

namespace simt {
namespace {

constexpr std::align_val_t SHARED_ALIGNMENT{128};
// Warps keep their rank in the schedule for so many turns on average, by seed. One warp then runs
// far ahead of another, which shows a missing barrier; and a thread that spins on an atomic lets
// others by.
constexpr int TURNS_PER_RANKING[] = {32, 512, 8192};

struct Thread {
  Fiber fiber;
  uint3 index;
  Request request;
  uint64_t result;
};

// Lanes by what they do; those in no mask have exited, or were never there.
struct Warp {
  unsigned ready, at_barrier, at_collective;

  unsigned live() const { return ready | at_barrier | at_collective; }
};

struct SharedDeleter {
  void operator()(unsigned char* p) const { ::operator delete(p, SHARED_ALIGNMENT); }
};

class Scheduler {
 public:
  void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);
  uint64_t meet(const Request& request);
  void* shared_memory(const void* key, size_t bytes);
  int thread_in_block() const;
  void misuse(const char* what, const std::source_location& where);

  uint64_t seed = 0;
  uint64_t block_serial = 0;
  size_t dynamic_shared_bytes = 0;

 private:
  unsigned random(unsigned count);
  template <typename T>
  void shuffle(std::vector<T>& order);
  Thread& thread(int warp, int lane) { return *threads_[warp * WARP_SIZE + lane]; }

  void run_block();
  void start_block();
  std::pair<int, int> pick();
  void accept(int warp, int lane);
  void release_barrier();
  void try_collective(int warp, int lane);
  void complete_collective(int warp, unsigned group);
  std::string summary();
  [[noreturn]] void fail(const std::string& what);

  const std::function<void()>* body_ = nullptr;  // nullptr: no launch is running
  Thread* current_ = nullptr;
  std::vector<std::unique_ptr<Thread>> threads_;  // as many as the largest block had
  std::vector<Warp> warps_;
  std::vector<int> ranking_;  // of the warps
  std::map<const void*, std::unique_ptr<unsigned char, SharedDeleter>> shared_;
  std::string misuse_;
  int num_threads_ = 0, num_at_barrier_ = 0;
  uint64_t random_state_ = 0;
};

Scheduler scheduler;

unsigned Scheduler::random(unsigned count) {
  random_state_ = random_state_ * 6364136223846793005u + 1442695040888963407u;
  return static_cast<unsigned>((random_state_ >> 33) % count);
}

template <typename T>
void Scheduler::shuffle(std::vector<T>& order) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random(i)]);
}

void Scheduler::run_grid(dim3 grid, dim3 block, size_t shared_bytes,
                         const std::function<void()>& body) {
  if (body_ != nullptr) throw Error("simt: a launch inside a launch");
  struct Guard {
    Scheduler& s;
    ~Guard() {
      s.body_ = nullptr;
      s.current_ = nullptr;
      s.shared_.clear();
    }
  } const guard{*this};
  body_ = &body;
  dynamic_shared_bytes = shared_bytes;
  random_state_ = (seed + 1) * 0x9e3779b97f4a7c15u;
  gridDim = grid;
  blockDim = block;
  num_threads_ = static_cast<int>(block.x * block.y * block.z);
  while (static_cast<int>(threads_.size()) < num_threads_) {
    threads_.push_back(std::make_unique<Thread>());
  }
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  shuffle(blocks);
  for (uint64_t i : blocks) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    run_block();
  }
}

void Scheduler::run_block() {
  start_block();
  for (;;) {
    const auto [warp, lane] = pick();
    if (warp < 0) break;
    current_ = &thread(warp, lane);
    threadIdx = current_->index;
    current_->request = {};  // EXIT, unless meet() says otherwise
    current_->fiber.resume();
    if (!misuse_.empty()) fail(misuse_);
    accept(warp, lane);
  }
  unsigned at_collective = 0;
  for (const Warp& warp : warps_) at_collective |= warp.at_collective;
  if (at_collective != 0) fail("deadlock: " + summary());
  if (num_at_barrier_ > 0) fail("divergent barrier: " + summary());
}

void Scheduler::start_block() {
  shared_.clear();
  ++block_serial;
  misuse_.clear();
  warps_.assign((num_threads_ + WARP_SIZE - 1) / WARP_SIZE, Warp{});
  for (int i = 0; i < num_threads_; ++i) {
    const unsigned n = static_cast<unsigned>(i);
    threads_[i]->index = {n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y};
    threads_[i]->fiber.start([] { (*scheduler.body_)(); });
    warps_[i / WARP_SIZE].ready |= 1u << i % WARP_SIZE;
  }
  num_at_barrier_ = 0;
  ranking_.resize(warps_.size());
  std::iota(ranking_.begin(), ranking_.end(), 0);
  shuffle(ranking_);
}

// Warp and lane of the thread whose turn it is; -1 where none can run.
std::pair<int, int> Scheduler::pick() {
  if (random(TURNS_PER_RANKING[seed % 3]) == 0) shuffle(ranking_);
  for (int warp : ranking_) {
    const unsigned ready = warps_[warp].ready;
    if (ready == 0) continue;
    const int turn = static_cast<int>(random(WARP_SIZE));
    return {warp, (std::countr_zero(std::rotr(ready, turn)) + turn) % WARP_SIZE};
  }
  return {-1, -1};
}

// Files what the thread wants that has just run, and wakes those who waited for it.
void Scheduler::accept(int warp, int lane) {
  const Request& request = thread(warp, lane).request;
  Warp& lanes = warps_[warp];
  const unsigned bit = 1u << lane;
  if (request.op == Op::YIELD) return;
  lanes.ready &= ~bit;
  if (request.op == Op::EXIT) {
    for (int l = 0; l < WARP_SIZE; ++l) {
      if (lanes.at_collective >> l & 1) try_collective(warp, l);
    }
  } else if (is_barrier(request.op)) {
    lanes.at_barrier |= bit;
    if (++num_at_barrier_ == num_threads_) release_barrier();
  } else {
    lanes.at_collective |= bit;
    if ((request.mask & bit) == 0) {
      fail("lane " + std::to_string(lane) + " is not in its own mask: it " + describe(request));
    }
    if (!std::has_single_bit(static_cast<unsigned>(request.width)) || request.width > WARP_SIZE) {
      fail("a shuffle of width " + std::to_string(request.width) + ": lane " +
           std::to_string(lane) + " " + describe(request));
    }
    try_collective(warp, lane);
  }
}

void Scheduler::release_barrier() {
  int count = 0;
  for (int i = 0; i < num_threads_; ++i) {
    if (!same_place(threads_[i]->request.where, threads_[0]->request.where)) {
      fail("divergent barrier: " + summary());
    }
    count += threads_[i]->request.value != 0;
  }
  for (int i = 0; i < num_threads_; ++i) {
    const Op op = threads_[i]->request.op;
    threads_[i]->result = op == Op::SYNCTHREADS_AND  ? count == num_threads_
                          : op == Op::SYNCTHREADS_OR ? count > 0
                                                     : count;
  }
  for (Warp& warp : warps_) warp.ready |= std::exchange(warp.at_barrier, 0);
  num_at_barrier_ = 0;
}

// Completes the collective that a lane waits in if all lanes of its mask are there. As in CUDA, a
// lane that has exited is not waited for, but cannot be read either.
void Scheduler::try_collective(int warp, int lane) {
  const Request& request = thread(warp, lane).request;
  const unsigned group = request.mask & warps_[warp].live();
  if (group & ~warps_[warp].at_collective) return;
  for (int l = 0; l < WARP_SIZE; ++l) {
    // Is it in another meeting, without this lane, and comes here later?
    if (group >> l & 1 && !(thread(warp, l).request.mask >> lane & 1)) return;
  }
  for (int l = 0; l < WARP_SIZE; ++l) {
    const Request& other = thread(warp, l).request;
    const bool differs =
        other.mask != request.mask || other.op != request.op || other.run != request.run;
    if (group >> l & 1 && differs) {
      fail("lanes of warp " + std::to_string(warp) +
           " wait for each other in different calls: " + "lane " + std::to_string(lane) + " " +
           describe(request) + ", lane " + std::to_string(l) + " " + describe(other));
    }
  }
  complete_collective(warp, group);
}

void Scheduler::complete_collective(int warp, unsigned group) {
  unsigned ballot = 0;
  const Request& first = thread(warp, std::countr_zero(group)).request;
  if (first.op == Op::WARP) {
    if (first.whole_warp && ~group != 0) fail("lanes are missing: a lane " + describe(first));
    void* lanes[WARP_SIZE] = {};
    for (int l = 0; l < WARP_SIZE; ++l) {
      if (group >> l & 1) lanes[l] = thread(warp, l).request.lane_operand;
    }
    first.run(lanes);
  }
  for (int l = 0; l < WARP_SIZE; ++l) {
    if (group >> l & 1 && thread(warp, l).request.value != 0) ballot |= 1u << l;
  }
  for (int l = 0; l < WARP_SIZE; ++l) {
    if (!(group >> l & 1)) continue;
    Thread& t = thread(warp, l);
    t.result = t.request.op == Op::ANY   ? ballot != 0
               : t.request.op == Op::ALL ? ballot == group
                                         : ballot;
    if (!is_shuffle(t.request.op)) continue;
    const int source = source_lane(t.request, l);
    if (!(group >> source & 1)) {
      fail("lane " + std::to_string(l) + " of warp " + std::to_string(warp) + " reads lane " +
           std::to_string(source) + ", which " +
           (t.request.mask >> source & 1 ? "has exited" : "is not in the mask") + ": it " +
           describe(t.request));
    }
    t.result = thread(warp, source).request.value;
  }
  warps_[warp].at_collective &= ~group;
  warps_[warp].ready |= group;
}

std::string Scheduler::summary() {
  std::map<std::string, std::pair<int, int>> groups;  // count and first thread
  for (int i = 0; i < num_threads_; ++i) {
    const Warp& warp = warps_[i / WARP_SIZE];
    const bool ready = warp.ready >> i % WARP_SIZE & 1;
    ++groups.try_emplace(ready ? "runs" : describe(threads_[i]->request), 0, i).first->second.first;
  }
  std::string text;
  for (const auto& [what, threads] : groups) {
    text += (text.empty() ? "" : "; ") + std::to_string(threads.first) + " of " +
            std::to_string(num_threads_) + " threads, the first thread " +
            std::to_string(threads.second) + ": " + what;
  }
  return text;
}

void Scheduler::fail(const std::string& what) {
  throw Error("simt: block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) +
              ", " + std::to_string(blockIdx.z) + "), seed " + std::to_string(seed) + ": " + what);
}

uint64_t Scheduler::meet(const Request& request) {
  if (current_ == nullptr) throw Error("simt: device code is called outside a launch");
  Thread& self = *current_;
  self.request = request;
  Fiber::suspend();
  return self.result;
}

int Scheduler::thread_in_block() const {
  return static_cast<int>((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x);
}

// A fiber must not throw: the scheduler does, once the thread has given up its turn.
void Scheduler::misuse(const char* what, const std::source_location& where) {
  misuse_ = "thread " + std::to_string(thread_in_block()) + " at " + place(where) + ": " + what;
  Fiber::suspend();
}

void* Scheduler::shared_memory(const void* key, size_t bytes) {
  auto& memory = shared_[key];
  if (memory == nullptr) {
    memory.reset(static_cast<unsigned char*>(::operator new(bytes, SHARED_ALIGNMENT)));
    std::memset(memory.get(), 0xff, bytes);
  }
  return memory.get();
}

}  // namespace

uint64_t meet(const Request& request) { return scheduler.meet(request); }

void* shared_memory(const void* key, size_t bytes) { return scheduler.shared_memory(key, bytes); }

void* dynamic_shared_memory() {
  return scheduler.shared_memory(nullptr, scheduler.dynamic_shared_bytes);
}

int thread_in_block() { return scheduler.thread_in_block(); }

uint64_t block_serial() { return scheduler.block_serial; }

void misuse(const char* what, const std::source_location& where) {
  scheduler.misuse(what, where);
  std::abort();  // a thread that misused the machine is never resumed
}

void set_seed(uint64_t seed) { scheduler.seed = seed; }

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  scheduler.run_grid(grid, block, shared_bytes, thread);
}

}  // namespace simt
