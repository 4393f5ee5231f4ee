#include "simt/tensor.h"

#include <cstring>
#include <vector>

#include "simt/cuda.h"

namespace simt {
namespace {

constexpr size_t COPY_BYTES = 16;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// The copies of one thread that are on their way, oldest first, and where each group ends.
struct Pending {
  std::vector<Copy> copies;
  std::vector<size_t> groups;
};

Pending& pending_of_thread() {
  static std::vector<Pending> threads;
  static uint64_t block = 0;
  if (block != block_serial()) {
    threads.assign(MAX_THREADS, Pending{});
    block = block_serial();
  }
  return threads[thread_in_block()];
}

bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

float element_of(Element element, unsigned word, int half) {
  const auto bits = static_cast<uint16_t>(half == 0 ? word : word >> 16);
  return element == Element::FLOAT16 ? __half2float(__ushort_as_half(bits))
                                     : __bfloat162float(__ushort_as_bfloat16(bits));
}

struct LoadOperand {
  const unsigned char* row;
  int count;
  bool transposed;
  unsigned registers[4];
};

struct MultiplyOperand {
  Element element;
  const unsigned *a, *b;
  float* d;
};

void load_all(LoadOperand* const* lanes) {
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    LoadOperand& mine = *lanes[lane];
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < mine.count; ++i) {
      uint16_t pair[2];
      for (int e = 0; e < 2; ++e) {
        const int row = mine.transposed ? 2 * t + e : g, column = mine.transposed ? g : 2 * t + e;
        std::memcpy(&pair[e], lanes[8 * i + row]->row + 2 * column, 2);
      }
      mine.registers[i] = pair[0] | static_cast<unsigned>(pair[1]) << 16;
    }
  }
}

void multiply_all(MultiplyOperand* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    const MultiplyOperand& from = *lanes[lane];
    const int g = lane / 4, t = lane % 4;
    for (int e = 0; e < 2; ++e) {
      for (int i = 0; i < 4; ++i) {
        a[g + 8 * (i % 2)][2 * t + e + 8 * (i / 2)] = element_of(from.element, from.a[i], e);
      }
      for (int i = 0; i < 2; ++i) {
        b[2 * t + e + 8 * i][g] = element_of(from.element, from.b[i], e);
      }
    }
  }
  float d[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) lanes[lane]->d[i] += d[g + 8 * (i / 2)][2 * t + i % 2];
  }
}

void transpose_all(unsigned* const* lanes) {
  unsigned in[WARP_SIZE];
  for (int lane = 0; lane < WARP_SIZE; ++lane) in[lane] = *lanes[lane];
  for (int lane = 0; lane < WARP_SIZE; ++lane) {
    unsigned out = 0;
    for (int e = 0; e < 2; ++e) {
      const int row = 2 * (lane % 4) + e, column = lane / 4;
      const unsigned word = in[row * 4 + column / 2];
      out |= (column % 2 == 0 ? word & 0xffffu : word >> 16) << 16 * e;
    }
    *lanes[lane] = out;
  }
}

constexpr unsigned WHOLE_WARP = ~0u;

}  // namespace

void copy_async(void* shared, const void* global, size_t bytes, const Place& where) {
  if (!is_aligned(shared) || (bytes > 0 && !is_aligned(global))) {
    misuse("cp.async of 16 bytes at an address that is no multiple of 16", where);
  }
  std::memset(shared, 0xff, COPY_BYTES);
  pending_of_thread().copies.push_back({shared, global, bytes});
}

void commit_group() {
  Pending& pending = pending_of_thread();
  pending.groups.push_back(pending.copies.size());
}

void wait_group(int most) {
  Pending& pending = pending_of_thread();
  const auto groups = static_cast<int>(pending.groups.size());
  if (groups <= most) return;
  const size_t arrived = pending.groups[groups - 1 - most];
  for (size_t i = 0; i < arrived; ++i) {
    const Copy& copy = pending.copies[i];
    std::memset(copy.to, 0, COPY_BYTES);
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
  }
  pending.copies.erase(pending.copies.begin(), pending.copies.begin() + arrived);
  pending.groups.erase(pending.groups.begin(), pending.groups.end() - most);
  for (size_t& end : pending.groups) end -= arrived;
}

void load_matrices(unsigned* registers, int count, bool transposed, const void* row,
                   const Place& where) {
  LoadOperand operand{static_cast<const unsigned char*>(row), count, transposed, {}};
  const int lane = thread_in_block() % WARP_SIZE;
  if (lane < 8 * count && !is_aligned(row)) {
    misuse("ldmatrix from a row that does not start at a multiple of 16", where);
  }
  warp_operation("ldmatrix", WHOLE_WARP, true, operand, where,
                 [](LoadOperand* const* lanes) { load_all(lanes); });
  for (int i = 0; i < count; ++i) registers[i] = operand.registers[i];
}

unsigned transpose_matrix(unsigned value, const Place& where) {
  warp_operation("movmatrix", WHOLE_WARP, true, value, where,
                 [](unsigned* const* lanes) { transpose_all(lanes); });
  return value;
}

void multiply(Element element, float* d, const unsigned* a, const unsigned* b, const Place& where) {
  MultiplyOperand operand{element, a, b, d};
  warp_operation("mma", WHOLE_WARP, true, operand, where,
                 [](MultiplyOperand* const* lanes) { multiply_all(lanes); });
}

}  // namespace simt
