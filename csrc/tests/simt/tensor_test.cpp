// Tests of cp.async, ldmatrix, movmatrix and mma in the shim.
#include "ptx.h"
#include "simt/self_test.h"
#include "testing.h"

namespace {

using smartkv::DType;

enum class Fault { NONE, NO_WAIT, NO_BARRIER, EARLY_REUSE };

// C[16][8] = A[16][16] B[8][16]^T, with A through cp.async and ldmatrix. Another warp copies.
template <bool IS_HALF>
__global__ void product(const uint16_t* a, const uint16_t* b, float* c, Fault fault) {
  SMARTKV_SHARED(tile, uint16_t[16 * 16]);
  const int lane = threadIdx.x % 32;
  if (threadIdx.x >= 32) {
    smartkv::copy_async(&tile[lane * 8], a + lane * 8);
    smartkv::commit_copies();
    if (fault != Fault::NO_WAIT) smartkv::wait_copies<0>();
  }
  if (fault != Fault::NO_BARRIER) __syncthreads();
  if (threadIdx.x >= 32) {
    if (fault == Fault::EARLY_REUSE) smartkv::copy_async(&tile[lane * 8], a + lane * 8);
    return;
  }
  unsigned left[4], right[2];
  float sum[4] = {};
  smartkv::load_matrices(left, &tile[lane % 16 * 16 + lane / 16 * 8]);
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 2; ++i) {
    right[i] = b[g * 16 + 2 * t + 8 * i] | static_cast<unsigned>(b[g * 16 + 2 * t + 8 * i + 1])
                                               << 16;
  }
  if (IS_HALF) {
    smartkv::multiply_fp16(sum, left, right);
  } else {
    smartkv::multiply_bf16(sum, left, right);
  }
  for (int i = 0; i < 4; ++i) c[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = sum[i];
}

template <bool IS_HALF>
void test_product() {
  testing::Dense a(IS_HALF ? DType::FLOAT16 : DType::BFLOAT16, 1, 1, 16, 16), b = a;
  a.fill_normal();
  b.fill_normal();
  alignas(16) uint16_t left[256];
  std::memcpy(left, a.bytes.data(), sizeof left);
  const auto* const right = reinterpret_cast<const uint16_t*>(b.bytes.data());
  const auto error = [&](Fault fault) {
    std::vector<float> c(128);
    SMARTKV_LAUNCH(product<IS_HALF>, 1, 64, 0, nullptr, left, right, c.data(), fault);
    double worst = 0;
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        double sum = 0;
        for (int k = 0; k < 16; ++k) sum += a.get(i * 16 + k) * b.get(j * 16 + k);
        const double off = std::fabs(c[i * 8 + j] - sum);
        worst = std::isnan(off) ? INFINITY : std::max(worst, off);
      }
    }
    return worst;
  };
  int caught[4] = {};
  for (int seed = 0; seed < 8; ++seed) {
    simt::set_seed(seed);
    for (int fault = 0; fault < 4; ++fault) caught[fault] += error(Fault(fault)) > 1e-5;
  }
  simt::set_seed(0);
  CHECK(caught[0] == 0 && caught[1] == 8 && caught[2] > 0 && caught[3] > 0, "%d %d %d %d",
        caught[0], caught[1], caught[2], caught[3]);
}

// Zeros where nothing is read, and groups that arrive in order.
__global__ void copy_in_groups(const int* from, int* out) {
  SMARTKV_SHARED(tile, int[3 * 4]);
  for (int i = 0; i < 3; ++i) {
    smartkv::copy_async(tile + 4 * i, from + 4 * i, i != 1);
    smartkv::commit_copies();
  }
  smartkv::wait_copies<1>();
  for (int i = 0; i < 12; ++i) out[i] = tile[i];
}

__global__ void transpose(const uint16_t* in, uint16_t* by_load, uint16_t* by_move) {
  SMARTKV_SHARED(tile, uint16_t[4][8][8]);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (int i = lane; i < 256; i += 32) tile[i / 64][i / 8 % 8][i % 8] = in[i];
  __syncwarp();
  unsigned r[4];
  smartkv::load_matrices_transposed(r, tile[lane / 8][lane % 8]);
  const unsigned moved = smartkv::transpose_matrix(
      tile[0][g][2 * t] | static_cast<unsigned>(tile[0][g][2 * t + 1]) << 16);
  for (int e = 0; e < 2; ++e) {
    by_move[g * 8 + 2 * t + e] = moved >> 16 * e;
    for (int i = 0; i < 4; ++i) by_load[i * 64 + g * 8 + 2 * t + e] = r[i] >> 16 * e;
  }
}

void test_moves() {
  alignas(16) int from[12];
  for (int i = 0; i < 12; ++i) from[i] = i + 1;
  std::vector<int> out(12);
  SMARTKV_LAUNCH(copy_in_groups, 1, 1, 0, nullptr, from, out.data());
  CHECK((out == std::vector<int>{1, 2, 3, 4, 0, 0, 0, 0, -1, -1, -1, -1}));
  std::vector<uint16_t> in(256), by_load(256), by_move(64);
  for (int i = 0; i < 256; ++i) in[i] = i;
  SMARTKV_LAUNCH(transpose, 1, 32, 0, nullptr, in.data(), by_load.data(), by_move.data());
  for (int i = 0; i < 256; ++i) {
    const int flipped = i / 64 * 64 + i % 8 * 8 + i / 8 % 8;
    CHECK(by_load[i] == flipped && (i >= 64 || by_move[i] == flipped));
  }
}

enum class Misuse { HALF_WARP, ODD_ROW, ODD_COPY };

__global__ void wrong_use(Misuse misuse) {
  SMARTKV_SHARED(tile, uint16_t[512]);
  unsigned r[4];
  if (misuse == Misuse::HALF_WARP && threadIdx.x < 16) smartkv::transpose_matrix(1);
  if (misuse == Misuse::ODD_ROW) smartkv::load_matrices(r, tile + threadIdx.x);
  if (misuse == Misuse::ODD_COPY) smartkv::copy_async(tile + 4, tile);
}

void test_misuse() {
  const std::pair<Misuse, const char*> expected[] = {
      {Misuse::HALF_WARP, "lanes are missing: a lane waits in movmatrix"},
      {Misuse::ODD_ROW, "ldmatrix from a row that does not start at a multiple of 16"},
      {Misuse::ODD_COPY, "cp.async of 16 bytes at an address that is no multiple of 16"},
  };
  for (const auto& [misuse, part] : expected) {
    std::string text;
    try {
      const Misuse m = misuse;
      SMARTKV_LAUNCH(wrong_use, 1, 32, 0, nullptr, m);
    } catch (const simt::Error& error) {
      text = error.what();
    }
    CHECK(text.find(part) != std::string::npos, "'%s' is not in '%s'", part, text.c_str());
  }
}

__global__ void match_and_reduce(const unsigned* in, unsigned* same, unsigned* top,
                                 unsigned* perm) {
  const int lane = threadIdx.x;
  same[lane] = __match_any_sync(~0u, in[lane]);
  top[lane] = __reduce_max_sync(~0u, in[lane]);
  perm[lane] = smartkv::permute_bytes(0x83828180u, 0x07060504u, 0xc840u + in[lane]);
}

void test_warp_values() {
  std::vector<unsigned> in(32), same(32), top(32), perm(32);
  for (int i = 0; i < 32; ++i) in[i] = i % 3;
  SMARTKV_LAUNCH(match_and_reduce, 1, 32, 0, nullptr, in.data(), same.data(), top.data(),
                 perm.data());
  for (int i = 0; i < 32; ++i) {
    unsigned expected = 0;
    for (int j = 0; j < 32; ++j) expected |= unsigned{j % 3 == i % 3} << j;
    CHECK(same[i] == expected && top[i] == 2);
    CHECK(perm[i] == (0x00ff0480u | (0x80u + i % 3)), "%08x", perm[i]);
  }
}

}  // namespace

void simt::tensor_test() {
  test_product<true>();
  test_product<false>();
  test_moves();
  test_misuse();
  test_warp_values();
}
