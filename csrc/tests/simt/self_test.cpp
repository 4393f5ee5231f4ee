#include "simt/self_test.h"

#include "cuda_prelude.h"
#include "testing.h"

using smartkv::DType;

namespace {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int NUM_SEEDS = 8;

// What the shim has against a launch; empty where it has nothing.
template <typename F>
std::string complaint(F&& launch) {
  try {
    launch();
  } catch (const simt::Error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

template <typename F>
void for_all_seeds(F&& check) {
  for (int seed = 0; seed < NUM_SEEDS; ++seed) {
    simt::set_seed(seed);
    check();
  }
  simt::set_seed(0);
}

// Barriers and shared memory

template <bool WITH_BARRIER>
__global__ void block_sum(const int* x, int n, int* out) {
  SMARTKV_SHARED(partial, int[8]);
  const int lane = threadIdx.x % warpSize, warp = threadIdx.x / warpSize;
  int sum = 0;
  for (unsigned i = threadIdx.x; i < static_cast<unsigned>(n); i += blockDim.x) sum += x[i];
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_down_sync(ALL_LANES, sum, distance);
  }
  if (lane == 0) partial[warp] = sum;
  if (WITH_BARRIER) __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0;
    for (unsigned w = 0; w < blockDim.x / warpSize; ++w) total += partial[w];
    out[blockIdx.x] = total;
  }
}

void test_block_sum() {
  std::vector<int> x(1000);
  int expected = 0, wrong = 0;
  for (int& value : x) expected += value = testing::random_int(0, 1000);
  for_all_seeds([&] {
    std::vector<int> out(3);
    SMARTKV_LAUNCH(block_sum<true>, 3, 256, 0, nullptr, x.data(), 1000, out.data());
    for (int sum : out) CHECK(sum == expected, "%d, not %d", sum, expected);
    SMARTKV_LAUNCH(block_sum<false>, 1, 256, 0, nullptr, x.data(), 1000, out.data());
    wrong += out[0] != expected;
  });
  CHECK(wrong > 0, "a missing barrier goes unseen");
}

// Every block finds its shared memory poisoned, whatever the block before it wrote.
__global__ void read_fresh_shared(float* out) {
  SMARTKV_SHARED(tile, float[2][64]);
  SMARTKV_DYNAMIC_SHARED(scratch, float);
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[2 * i] = tile[1][threadIdx.x];
  out[2 * i + 1] = scratch[threadIdx.x];
  tile[1][threadIdx.x] = scratch[threadIdx.x] = 1;
}

void test_shared_memory() {
  std::vector<float> out(2 * 3 * 64);
  SMARTKV_LAUNCH(read_fresh_shared, 3, 64, 64 * sizeof(float), nullptr, out.data());
  for (float x : out) CHECK(std::isnan(x), "%g", x);
}

__global__ void exit_before_barrier() {
  if (threadIdx.x >= 40) return;
  __syncthreads();
}

__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_and_shuffle() {
  if (threadIdx.x % 32 < 7) {
    __syncthreads();
  } else {
    __shfl_xor_sync(ALL_LANES, 1, 1);
  }
}

__global__ void vote_of_block(int* out) {
  const int odd = threadIdx.x % 2;
  const int count = __syncthreads_count(odd);
  out[threadIdx.x] = count + 1000 * __syncthreads_or(odd) + 2000 * __syncthreads_and(odd);
}

void test_barriers() {
  for_all_seeds([] {
    std::string text = complaint([] { SMARTKV_LAUNCH(exit_before_barrier, 1, 128, 0, nullptr); });
    CHECK(contains(text, "divergent barrier: 40 of 128 threads") ||
              contains(text, "divergent barrier: 88 of 128 threads"),
          "%s", text.c_str());
    CHECK(contains(text, "waits in __syncthreads at self_test.cpp:"), "%s", text.c_str());
    text = complaint([] { SMARTKV_LAUNCH(two_barriers, 1, 64, 0, nullptr); });
    CHECK(contains(text, "divergent barrier"), "%s", text.c_str());
    text = complaint([] { SMARTKV_LAUNCH(barrier_and_shuffle, 1, 32, 0, nullptr); });
    CHECK(contains(text, "deadlock") && contains(text, "with mask 0xffffffff"), "%s", text.c_str());
    std::vector<int> out(70);
    SMARTKV_LAUNCH(vote_of_block, 1, 70, 0, nullptr, out.data());
    for (int x : out) CHECK(x == 1035, "%d", x);
  });
}

// Shuffles and votes

__global__ void shuffle_all(int width, int operand, int* out) {
  const int lane = threadIdx.x;
  out[lane] = __shfl_sync(ALL_LANES, lane, operand, width);
  out[32 + lane] = __shfl_up_sync(ALL_LANES, lane, operand, width);
  out[64 + lane] = __shfl_down_sync(ALL_LANES, lane, operand, width);
  out[96 + lane] = static_cast<int>(__shfl_xor_sync(ALL_LANES, double(lane), operand, width));
}

void test_shuffles() {
  for (int width : {1, 2, 8, 32}) {
    for (int operand : {0, 1, 3, 5, 16, 31}) {
      std::vector<int> out(128);
      SMARTKV_LAUNCH(shuffle_all, 1, 32, 0, nullptr, width, operand, out.data());
      for (int lane = 0; lane < 32; ++lane) {
        const int first = lane / width * width, i = lane - first;
        const int other = lane ^ operand;
        CHECK(out[lane] == first + operand % width);
        CHECK(out[32 + lane] == (i >= operand ? lane - operand : lane));
        CHECK(out[64 + lane] == (i + operand < width ? lane + operand : lane));
        CHECK(out[96 + lane] == (other < first + width ? other : lane));
      }
    }
  }
}

// Half-warps that meet on their own, a different number of times, and then all together.
__global__ void shuffle_in_halves(int* out) {
  const int lane = threadIdx.x;
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int sum = lane;
  for (int mask = 8; mask > 0; mask /= 2) sum += __shfl_xor_sync(half, sum, mask);
  if (lane < 16) sum = __shfl_sync(half, sum, lane);
  __syncwarp();
  out[lane] = sum + 1000 * __shfl_xor_sync(ALL_LANES, sum, 16);
}

// The lanes below `count` stay: nobody waits for the others.
__global__ void vote_after_exit(int count, unsigned* out) {
  const int lane = threadIdx.x;
  if (lane >= count) return;
  const unsigned odd = __ballot_sync(ALL_LANES, lane % 2);
  const bool any = __any_sync(ALL_LANES, lane == 2), all = __all_sync(ALL_LANES, lane < count);
  out[lane] = odd + (any && all);
}

void test_votes() {
  for_all_seeds([] {
    std::vector<int> sums(32);
    SMARTKV_LAUNCH(shuffle_in_halves, 1, 32, 0, nullptr, sums.data());
    for (int lane = 0; lane < 32; ++lane) CHECK(sums[lane] == (lane < 16 ? 376120 : 120376));
    std::vector<unsigned> odd(6);
    SMARTKV_LAUNCH(vote_after_exit, 1, 20, 0, nullptr, 6, odd.data());
    for (unsigned x : odd) CHECK(x == 0b101011, "%u", x);
  });
}

enum Mistake { NOT_IN_OWN_MASK, READS_OUTSIDE, READS_EXITED, MASKS_DIFFER, CALLS_DIFFER, ABSENT };

__global__ void wrong_shuffle(Mistake mistake) {
  const int lane = threadIdx.x;
  if (mistake == NOT_IN_OWN_MASK) __shfl_xor_sync(0x0000ffffu, lane, 1);
  if (mistake == READS_OUTSIDE && lane < 16) __shfl_xor_sync(0x0000ffffu, lane, 16);
  if (mistake == READS_EXITED && lane < 20) __shfl_down_sync(ALL_LANES, lane, 1);
  if (mistake == MASKS_DIFFER) __shfl_xor_sync(lane < 3 ? 0x7fffffffu : ALL_LANES, lane, 1);
  if (mistake == CALLS_DIFFER) {
    lane < 9 ? __shfl_up_sync(ALL_LANES, lane, 1) : __shfl_xor_sync(ALL_LANES, lane, 1);
  }
  if (mistake == ABSENT) {
    if (lane > 0) __shfl_sync(ALL_LANES, lane, 5);
    __syncthreads();
  }
}

void test_wrong_shuffles() {
  const std::pair<Mistake, const char*> expected[] = {
      {NOT_IN_OWN_MASK, "is not in its own mask: it waits in __shfl_xor_sync"},
      {READS_OUTSIDE, "which is not in the mask"},
      {READS_EXITED, "lane 19 of warp 0 reads lane 20, which has exited"},
      {MASKS_DIFFER, "wait for each other in different calls"},
      {CALLS_DIFFER, "wait for each other in different calls"},
      {ABSENT, "deadlock: 31 of 32 threads, the first thread 1: waits in __shfl_sync with mask"},
  };
  for_all_seeds([&] {
    for (const auto& [mistake, part] : expected) {
      const Mistake m = mistake;
      const std::string text =
          complaint([&] { SMARTKV_LAUNCH(wrong_shuffle, 1, 32, 0, nullptr, m); });
      CHECK(contains(text, part), "'%s' is not in '%s'", part, text.c_str());
    }
  });
}

// Atomics, schedule, launches

__global__ void histogram(const int* x, int n, int* counts, int* order, int* turn) {
  SMARTKV_DYNAMIC_SHARED(mine, int);
  for (int i = threadIdx.x; i < 16; i += blockDim.x) mine[i] = 0;
  __syncthreads();
  const int first = blockIdx.x * blockDim.x + threadIdx.x;
  for (int i = first; i < n; i += gridDim.x * blockDim.x) atomicAdd(&mine[x[i]], 1);
  __syncthreads();
  for (int i = threadIdx.x; i < 16; i += blockDim.x) atomicAdd(&counts[i], mine[i]);
  order[atomicAdd(turn, 1)] = first;
}

__global__ void locked_increments(int* lock, int* count) {
  while (atomicCAS(lock, 0, 1) != 0) {
  }
  const int old = *count;
  __threadfence();
  *count = old + 1;
  atomicExch(lock, 0);
}

void test_atomics() {
  std::vector<int> x(999), expected(16);
  for (int& value : x) ++expected[value = testing::random_int(0, 15)];
  std::vector<std::vector<int>> orders;
  const auto run = [&] {
    std::vector<int> counts(16), order(3 * 50);
    int turn = 0, lock = 0, count = 0;
    SMARTKV_LAUNCH(histogram, 3, 50, 16 * sizeof(int), nullptr, x.data(), 999, counts.data(),
                   order.data(), &turn);
    CHECK(counts == expected && turn == 150);
    orders.push_back(order);
    SMARTKV_LAUNCH(locked_increments, 2, 96, 0, nullptr, &lock, &count);
    CHECK(count == 192, "%d", count);
  };
  for_all_seeds(run);
  for_all_seeds(run);
  for (int seed = 0; seed < NUM_SEEDS; ++seed) {
    CHECK(orders[seed] == orders[NUM_SEEDS + seed], "seed %d does not repeat", seed);
    CHECK(seed == 0 || orders[seed] != orders[seed - 1]);
  }
}

__global__ void count_visits(int* visits) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  ++visits[block * blockDim.x * blockDim.y * blockDim.z + thread];
}

void test_launches() {
  std::vector<int> visits(2 * 3 * 2 * 5 * 4 * 3);
  SMARTKV_LAUNCH(count_visits, dim3(2, 3, 2), dim3(5, 4, 3), 0, nullptr, visits.data());
  for (int count : visits) CHECK(count == 1);
  CHECK(cudaGetLastError() == cudaSuccess);
  SMARTKV_LAUNCH(count_visits, 0, 32, 0, nullptr, visits.data());
  CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
  SMARTKV_LAUNCH(count_visits, 1, 1025, 0, nullptr, visits.data());
  CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
  SMARTKV_LAUNCH(count_visits, 1, 32, 1 << 20, nullptr, visits.data());
  CHECK(cudaGetLastError() == cudaErrorInvalidValue && cudaGetLastError() == cudaSuccess);
}

// 16-bit floats

float half_value(int bits, DType dtype) {
  return dtype == DType::FLOAT16 ? __half2float(__ushort_as_half(bits))
                                 : __bfloat162float(__ushort_as_bfloat16(bits));
}

int half_bits(float x, DType dtype) {
  return dtype == DType::FLOAT16 ? __half_as_ushort(__float2half_rn(x))
                                 : __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

// Every value survives; what lies between two neighbours goes to the nearer, a tie to the even one.
void test_half(DType dtype, int infinity) {
  testing::Dense stored(dtype, 1, 1, 1, 1);
  for (int bits = 0; bits < 0x10000; ++bits) {
    const uint16_t half = bits;
    std::memcpy(stored.bytes.data(), &half, 2);
    const float x = half_value(bits, dtype), expected = stored.get(0);
    const bool nan = (bits & 0x7fff) > infinity;
    CHECK(nan ? std::isnan(x) : x == expected && std::signbit(x) == std::signbit(expected));
    CHECK(half_bits(x, dtype) == (nan ? 0x7fff : bits), "%04x", bits);
    if ((bits & 0x7fff) >= infinity - 1) continue;
    const float next = half_value(bits + 1, dtype), middle = x / 2 + next / 2;
    CHECK(half_bits(middle, dtype) == bits + bits % 2, "%04x", bits);
    if (middle == 0 || middle == x || middle == next) continue;  // below the smallest float
    CHECK(half_bits(std::nextafter(middle, x), dtype) == bits, "%04x", bits);
    CHECK(half_bits(std::nextafter(middle, next), dtype) == bits + 1, "%04x", bits);
  }
  const float top = half_value(infinity - 1, dtype);
  const float step = top - half_value(infinity - 2, dtype);
  CHECK(half_bits(top + step / 4, dtype) == infinity - 1);
  CHECK(half_bits(top + step / 2, dtype) == infinity);
  CHECK(half_bits(-INFINITY, dtype) == (infinity | 0x8000));
}

}  // namespace

void simt::self_test() {
  test_block_sum();
  test_shared_memory();
  test_barriers();
  test_shuffles();
  test_votes();
  test_wrong_shuffles();
  test_atomics();
  test_launches();
  test_half(DType::FLOAT16, 0x7c00);
  test_half(DType::BFLOAT16, 0x7f80);
}
