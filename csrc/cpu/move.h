// Moves records between two pages of a tier, as many as they exchange.
#pragma once

namespace smartkv::SMARTKV_ISA {

// Bit s of `to`: record from[s] of the source page goes to slot s. The other `from` are any slots.
struct Moves {
  uint64_t to = 0;
  alignas(64) uint8_t from[PAGE_SIZE] = {};
};

// The pages that come next, fetched a few lines at a time between other work: of a whole page at
// once the processor drops what its queue of misses cannot hold.
class Ahead {
 public:
  explicit Ahead(int64_t page_bytes) : page_bytes_(page_bytes) {}

  // Keeps at most one page behind the one that is being fetched.
  void add(const uint8_t* page) {
    if (at_ == end_) {
      start(page);
    } else {
      next_ = page;
    }
  }
  SMARTKV_INLINE void fetch(int lines) {
    for (int i = 0; i < lines; ++i, at_ += 64) {
      if (at_ == end_) {
        if (next_ == nullptr) return;
        start(next_);
        next_ = nullptr;
      }
      __builtin_prefetch(at_);
    }
  }

 private:
  void start(const uint8_t* page) {
    at_ = page;
    end_ = page + page_bytes_;
  }

  int64_t page_bytes_;  // a multiple of 64
  const uint8_t *at_ = nullptr, *end_ = nullptr, *next_ = nullptr;
};

// Records as rows. Only rows that move are touched, so only those are fetched, two moves ahead.
inline void move_rows(const PageLayout& layout, uint8_t* to, const uint8_t* from,
                      const Moves& moves) {
  constexpr int AHEAD = 2;
  const int64_t row = int64_t{layout.head_dim} * layout.itemsize;
  int slot[PAGE_SIZE + AHEAD], count = 0;
  for (uint64_t bits = moves.to; bits != 0; bits &= bits - 1) {
    slot[count++] = __builtin_ctzll(bits);
  }
  for (int i = 0; i < AHEAD; ++i) slot[count + i] = slot[count - 1];
  for (int i = -AHEAD; i < count; ++i) {
    const int64_t into = slot[i + AHEAD] * row, out_of = moves.from[slot[i + AHEAD]] * row;
    for (int64_t at = 0; at < row; at += 64) {
      __builtin_prefetch(from + layout.k_codes + out_of + at);
      __builtin_prefetch(from + layout.v_codes + out_of + at);
      __builtin_prefetch(to + layout.k_codes + into + at, 1);
      __builtin_prefetch(to + layout.v_codes + into + at, 1);
    }
    if (i < 0) continue;
    copy_record(layout, {to, slot[i]}, {const_cast<uint8_t*>(from), moves.from[slot[i]]});
  }
}

#if defined(SMARTKV_AVX512)

// Moves as operands of permutations.
struct Permutation {
  __mmask64 to;
  __m512i word[4];   // source slot of 16 slots, as int32
  __m512i half[2];   // of 32 slots, as int16
  __mmask16 far[4];  // those whose source is in the upper half of the page

  explicit Permutation(const Moves& moves) : to(moves.to) {
    for (int i = 0; i < 4; ++i) {
      word[i] = _mm512_cvtepu8_epi32(
          _mm_load_si128(reinterpret_cast<const __m128i*>(moves.from + 16 * i)));
      far[i] = _mm512_cmpge_epi32_mask(word[i], _mm512_set1_epi32(32));
    }
    for (int i = 0; i < 2; ++i) {
      half[i] = _mm512_cvtepu8_epi16(
          _mm256_load_si256(reinterpret_cast<const __m256i*>(moves.from + 32 * i)));
    }
  }
};

// 64 numbers of 32 bits, 16 in each of four lines that are `stride` bytes apart.
SMARTKV_INLINE void permute_words(uint8_t* to, const uint8_t* from, int64_t stride,
                                  const Permutation& p) {
  __m512i x[4];
  for (int i = 0; i < 4; ++i) x[i] = _mm512_loadu_si512(from + i * stride);
  SMARTKV_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512i near = _mm512_permutex2var_epi32(x[0], p.word[i], x[1]);
    const __m512i far = _mm512_permutex2var_epi32(x[2], p.word[i], x[3]);
    _mm512_mask_storeu_epi32(to + i * stride, static_cast<__mmask16>(p.to >> (16 * i)),
                             _mm512_mask_blend_epi32(p.far[i], near, far));
  }
}

// 64 numbers of 16 bits.
SMARTKV_INLINE void permute_halves(uint8_t* to, const uint8_t* from, const Permutation& p) {
  const __m512i low = _mm512_loadu_si512(from), high = _mm512_loadu_si512(from + 64);
  for (int i = 0; i < 2; ++i) {
    _mm512_mask_storeu_epi16(to + 64 * i, static_cast<__mmask32>(p.to >> (32 * i)),
                             _mm512_permutex2var_epi16(low, p.half[i], high));
  }
}

// V lanes: words of 4 records each, a byte of every word moves. Slots that stay are shuffled too,
// under an empty mask: which they are is not foreseeable, a branch would cost more.
template <int LANES>
SMARTKV_INLINE void permute_v(uint8_t* to_plane, const uint8_t* from_plane, const Moves& moves,
                              Ahead& ahead) {
  for (int quad = 0; quad < PAGE_SIZE / 4; ++quad) {
    ahead.fetch((LANES + 15) / 16 + 1);  // one more than it touches
    const uint8_t* source[4];
    __mmask64 mask[4];
    __m512i rotation[4];
    SMARTKV_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int s = moves.from[4 * quad + i];
      source[i] = from_plane + s / 4 * (4 * LANES);
      mask[i] = (moves.to >> (4 * quad + i) & 1) * (0x1111111111111111ull << i);
      // Byte i of a word comes from byte s % 4.
      rotation[i] = _mm512_add_epi8(_mm512_set1_epi32(0x01010101 * (s % 4)),
                                    _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0));
    }
    uint8_t* to = to_plane + quad * 4 * LANES;
    SMARTKV_UNROLL
    for (int j = 0; j < LANES; j += 16, to += 64) {
      const __mmask64 inside = LANES - j < 16 ? (1ull << (4 * (LANES - j) % 64)) - 1 : ~0ull;
      __m512i words = _mm512_loadu_si512(to);
      SMARTKV_UNROLL
      for (int i = 0; i < 4; ++i) {
        words = _mm512_mask_shuffle_epi8(words, mask[i] & inside,
                                         _mm512_loadu_si512(source[i] + 4 * j), rotation[i]);
      }
      _mm512_storeu_si512(to, words);
    }
  }
}

template <int TIER, int HEAD_DIM>
inline void permute_records(uint8_t* to, const uint8_t* from, const Moves& moves, Ahead& ahead) {
  constexpr PageLayout LAYOUT = page_layout(TIER, HEAD_DIM);
  const Permutation p(moves);
  each_plane<LAYOUT.k_bits, HEAD_DIM>(to + LAYOUT.k_codes, [&]<int WIDTH, int>(uint8_t* plane) {
    constexpr int LANES = plane_lanes(HEAD_DIM, WIDTH);
    for (int j = 0; j < LANES; j += 4) {
      uint8_t* line = plane + 16 * j;
      ahead.fetch(5);  // of four that it touches
      permute_words(line, from + (line - to), 16 * LANES, p);
    }
  });
  each_plane<LAYOUT.v_bits, HEAD_DIM>(to + LAYOUT.v_codes, [&]<int WIDTH, int>(uint8_t* plane) {
    permute_v<plane_lanes(HEAD_DIM, WIDTH)>(plane, from + (plane - to), moves, ahead);
  });
  permute_halves(to + LAYOUT.k_scale, from + LAYOUT.k_scale, p);
  permute_halves(to + LAYOUT.v_scale, from + LAYOUT.v_scale, p);
  permute_words(to + LAYOUT.position, from + LAYOUT.position, 64, p);
  permute_halves(to + LAYOUT.score, from + LAYOUT.score, p);
}

#endif

// The pages may be one.
inline void move_records(const PageLayout& layout, uint8_t* to, const uint8_t* from,
                         const Moves& moves, Ahead& ahead) {
  if (layout.is_raw()) return move_rows(layout, to, from, moves);
#if defined(SMARTKV_AVX512)
  with_format(layout.tier, layout.head_dim, [&]<int TIER, int HEAD_DIM>() {
    permute_records<TIER, HEAD_DIM>(to, from, moves, ahead);
  });
#else
  const int lines = static_cast<int>(layout.page_bytes / 64 / 24);  // a page in 24 of 64 records
  for (uint64_t bits = moves.to; bits != 0; bits &= bits - 1) {
    const int s = __builtin_ctzll(bits);
    ahead.fetch(lines);
    copy_record(layout, {to, s}, {const_cast<uint8_t*>(from), moves.from[s]});
  }
#endif
}

}  // namespace smartkv::SMARTKV_ISA
