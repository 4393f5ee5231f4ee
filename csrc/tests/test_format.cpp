// Layout, packing, levels, rotation and the small numeric pieces of the generic kernels.
#include <stdexcept>

#include "kernel_prelude.h"
#define SMARTKV_ISA portable_under_test
#include "kernels.h"
#include "testing.h"

using namespace smartkv;
using namespace smartkv::portable_under_test;

namespace {

void test_layout() {
  CHECK(page_layout(4, 128).page_bytes == 64 * (128 + 4 + 4 + 2));
  CHECK(page_layout(302, 128).page_bytes == 64 * (48 + 32 + 4 + 4 + 2));
  CHECK(page_layout(16, 80, 4).page_bytes == 64 * (80 * 8 + 4 + 2));
  CHECK(plane_lanes(80, 1) == 12 && plane_lanes(80, 2) == 20 && record_lanes(3, 80) == 32);
  for (int head_dim : HEAD_DIMS) {
    for (int tier : TIERS) {
      const PageLayout layout = page_layout(tier, head_dim);
      for (int64_t section : {layout.v_codes, layout.position, layout.score, layout.page_bytes}) {
        CHECK(section % 64 == 0);
      }
      if (layout.is_raw()) continue;
      const int k_lanes = record_lanes(layout.k_bits, head_dim);
      const int v_lanes = record_lanes(layout.v_bits, head_dim);
      CHECK(layout.v_codes == 64 * k_lanes && layout.k_scale == 64 * (k_lanes + v_lanes));
      std::vector<int> k_seen(64 * k_lanes), v_seen(64 * v_lanes);
      for (int s = 0; s < 64; ++s) {
        for (int j = 0; j < k_lanes; ++j) ++k_seen[k_lane_offset(k_lanes, s, j)];
        for (int j = 0; j < v_lanes; ++j) ++v_seen[v_lane_offset(v_lanes, s, j)];
      }
      for (int n : k_seen) CHECK(n == 1);
      for (int n : v_seen) CHECK(n == 1);
    }
  }
}

template <bool IS_V, int BITS, int HEAD_DIM>
void test_packing() {
  constexpr int bits = BITS, head_dim = HEAD_DIM, bytes = 64 * record_lanes(bits, head_dim);
  std::vector<uint8_t> section(bytes + 256, 0xa5);
  std::vector<Codes> written(64);
  for (int s = 63; s >= 0; --s) {
    written[s] = Codes{};
    for (int c = 0; c < head_dim; ++c) {
      written[s].at[c] = static_cast<uint8_t>(testing::random_int(0, (1 << bits) - 1));
    }
    write_codes<IS_V, BITS, HEAD_DIM>(section.data(), s, written[s]);
  }
  for (int i = bytes; i < bytes + 256; ++i) CHECK(section[i] == 0xa5);
  SectionCodec codec;
  codec.set(bits, Levels::GAUSSIAN, head_dim);
  std::vector<float> storage(tile_floats(head_dim) + 16);
  float* tile = storage.data();
  if (IS_V) {
    decode_v_tile(tile, section.data(), codec);
  } else {
    decode_k_tile(tile, section.data(), codec);
  }
  for (int s = 0; s < 64; ++s) {
    Codes codes;
    read_codes<IS_V, BITS, HEAD_DIM>(section.data(), s, codes);
    for (int c = 0; c < head_dim; ++c) {
      CHECK(codes.at[c] == written[s].at[c], "bits %d head_dim %d", bits, head_dim);
      const float level = level_of(bits, Levels::GAUSSIAN, codes.at[c]);
      CHECK((IS_V ? tile[s * v_stride(head_dim) + c] : tile[c * 64 + s]) == level);
    }
  }
}

void test_levels() {
  for (Levels levels : {Levels::UNIFORM, Levels::GAUSSIAN}) {
    for (int bits : {2, 3, 4, 8}) {
      for (int code = 0; code + 1 < 1 << bits; ++code) {
        CHECK(level_of(bits, levels, code) < level_of(bits, levels, code + 1));
      }
    }
    const Codebook book = make_codebook(4, levels);
    CHECK(book.level[15] == -book.level[0] && book.midpoint[7] == 0);
  }
}

// Midpoints strictly below count: a value on a midpoint belongs to the lower level.
template <int BITS>
void test_midpoints(Levels levels) {
  const Codebook book = make_codebook(BITS, levels);
  const MidpointCounter counter(book, BITS, levels);
  const int count = (1 << BITS) - 1;
  const auto check = [&](float x) {
    int expected = 0;
    for (int i = 0; i < count; ++i) expected += book.midpoint[i] < x;
    int32_t codes[16];
    store(codes, counter.template count<BITS>(splat(x)));
    CHECK(codes[0] == expected && codes[15] == expected, "%d bits: %g is code %d, not %d", BITS, x,
          codes[0], expected);
  };
  for (int i = 0; i < count; ++i) {
    const float x = book.midpoint[i];
    for (float y : {x, std::nextafterf(x, -1e9f), std::nextafterf(x, 1e9f)}) check(y);
  }
  for (float x = -300; x < 300; x += 0.37f) check(x);
  for (float x : {-1e30f, 1e30f, 0.0f, -0.0f, 1e-30f, -1e-30f}) check(x);
}

void test_rotation(int head_dim) {
  std::vector<std::vector<float>> columns;
  alignas(64) float x[MAX_HEAD_DIM];
  for (int i = 0; i < head_dim; ++i) {
    for (int c = 0; c < head_dim; ++c) x[c] = c == i;
    rotate(x, head_dim);
    columns.emplace_back(x, x + head_dim);
    for (int c = 0; c < head_dim; ++c) {
      CHECK(std::fabs(std::fabs(x[c]) - rotation_scale(head_dim)) < 1e-7f);
    }
    rotate(x, head_dim, true);
    for (int c = 0; c < head_dim; ++c) CHECK(std::fabs(x[c] - (c == i)) < 1e-6f);
  }
  for (int i = 0; i < head_dim; ++i) {
    for (int j = 0; j < head_dim; ++j) {
      double dot = 0;
      for (int c = 0; c < head_dim; ++c) dot += double{columns[i][c]} * columns[j][c];
      CHECK(std::fabs(dot - (i == j)) < 1e-6, "head_dim %d: columns %d, %d", head_dim, i, j);
    }
  }
}

void test_half() {
  for (int h = 0; h < 65536; ++h) {
    const auto half = static_cast<uint16_t>(h);
    const float x = from_fp16(half);
    if (std::isnan(x)) continue;
    CHECK(to_fp16(x) == half, "%x", h);
    if ((h & 0x7fff) >= 0x7bff) continue;
    // Between neighbours, ties go to the even one.
    const float above = from_fp16(static_cast<uint16_t>(h + 1));
    CHECK(to_fp16((x + above) / 2) == static_cast<uint16_t>(h & 1 ? h + 1 : h), "%x", h);
  }
  CHECK(to_fp16(65519.9f) == 0x7bff && to_fp16(65520.0f) == 0x7c00 && to_fp16(1e-9f) == 0);
  CHECK(to_bf16(1.00390625f) == 0x3f80 && to_bf16(1.01171875f) == 0x3f82);
}

void test_exp() {
  for (float at = -86; at < 86; at += 0.37f) {
    float y[16];
    store(y, portable_under_test::exp(splat(at)));
    CHECK(std::fabs(y[5] / std::exp(double{at}) - 1) < 4e-7, "at %g", at);
  }
}

void test_gemm() {
  for (int rows : {1, 2, 3, 4, 5, 9}) {
    for (int columns : {16, 64, 80, 96}) {
      const int depth = 37;
      const std::vector<float> a = testing::normals(rows * depth);
      const std::vector<float> b = testing::normals(depth * columns);
      std::vector<float> c(rows * columns, 1.0f);
      gemm<true>({a.data(), depth, b.data(), columns, c.data(), columns, depth}, rows, columns);
      for (int i = 0; i < rows * columns; ++i) {
        double sum = 1;
        for (int k = 0; k < depth; ++k) {
          sum += double{a[i / columns * depth + k]} * b[k * columns + i % columns];
        }
        CHECK(std::fabs(sum - c[i]) < 1e-4);
      }
    }
  }
}

void test_dispatch() {
  const std::vector<std::string> sets = available_kernel_sets();
  CHECK(!sets.empty() && sets.back() == "portable");
  for (const std::string& name : sets) CHECK(kernel_set(name).name == name);
  bool thrown = false;
  try {
    kernel_set("avx9000");
  } catch (const std::runtime_error& error) {
    thrown = std::string(error.what()).find("avx9000") != std::string::npos;
  }
  CHECK(thrown);
}

}  // namespace

int main() {
  test_layout();
  for (int head_dim : HEAD_DIMS) {
    for (int bits : {2, 3, 4, 8}) {
      with_section(bits, head_dim, []<int BITS, int HEAD_DIM>() {
        test_packing<false, BITS, HEAD_DIM>();
        test_packing<true, BITS, HEAD_DIM>();
      });
    }
    test_rotation(head_dim);
  }
  test_levels();
  for (Levels levels : {Levels::UNIFORM, Levels::GAUSSIAN}) {
    test_midpoints<2>(levels);
    test_midpoints<3>(levels);
    test_midpoints<4>(levels);
  }
  test_half();
  test_exp();
  test_gemm();
  test_dispatch();
  return testing::report("format");
}
