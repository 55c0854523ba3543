// 64 bytes from places of their own, ROW at each, and bytes or words of two vectors in turns, within 16-byte lanes.
template <int ROW> LB_INLINE V rows_at(const uint8_t* book, const uint64_t* at) {
  // A broadcast from memory under a mask takes no shuffle; there are seven masks.
  if constexpr (ROW == 4) {
    const auto half = [&](const uint64_t* from) __attribute__((always_inline)) {
      const auto row = [&](int i) __attribute__((always_inline)) {
        int32_t x;
        memcpy(&x, book + from[i], 4);
        return x;
      };
      __m256i x = _mm256_set1_epi32(row(0));
#pragma GCC unroll 8
      for (int i = 1; i < 8; ++i) x = _mm256_mask_set1_epi32(x, __mmask8(1 << i), row(i));
      return x;
    };
    return _mm512_inserti64x4(_mm512_castsi256_si512(half(at)), half(at + 8), 1);
  } else if constexpr (ROW == 8) {
    const auto row = [&](int i) __attribute__((always_inline)) {
      long long x;
      memcpy(&x, book + at[i], 8);
      return x;
    };
#if LB_VBMI
    // Zen 4 loads two vectors of 32 bytes a cycle, but one of 64: 0.6 cycles a row instead of 0.9.
    const auto half = [&](int from) __attribute__((always_inline)) {
      __m256i x = _mm256_set1_epi64x(row(from));
#pragma GCC unroll 4
      for (int i = 1; i < 4; ++i) x = _mm256_mask_set1_epi64(x, __mmask8(1 << i), row(from + i));
      return x;
    };
    return _mm512_inserti64x4(_mm512_castsi256_si512(half(0)), half(4), 1);
#else
    V x = _mm512_set1_epi64(row(0));
#pragma GCC unroll 8
    for (int i = 1; i < 8; ++i) x = _mm512_mask_set1_epi64(x, __mmask8(1 << i), row(i));
    return x;
#endif
  } else {
    const auto row = [&](int i) __attribute__((always_inline)) {
      return _mm_loadu_si128((const __m128i*)(book + at[i]));
    };
    V x = _mm512_broadcast_i64x2(row(0));
#pragma GCC unroll 4
    for (int i = 1; i < 4; ++i) x = _mm512_mask_broadcast_i64x2(x, __mmask8(3 << 2 * i), row(i));
    return x;
  }
}
// Sums of bytes, modulo 256.
LB_INLINE V add_levels(V x, V y) { return _mm512_add_epi8(x, y); }
template <int HIGH> LB_INLINE V zip_bytes(V a, V b) {
  return HIGH ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
}
template <int HIGH> LB_INLINE V zip_words(V a, V b) {
  return HIGH ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
}

// Indices of four columns of 8 vectors at `p` and of 8 more at `q`, sorted: 32-bit lane v has those of vector v.
LB_INLINE V by_vector(const uint8_t* p, const uint8_t* q) {
  const V low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  const V x = _mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i*)q), 1);
#if LB_VBMI
  const V order = _mm512_set_epi32(0x3f372f27, 0x3e362e26, 0x3d352d25, 0x3c342c24,
                                   0x3b332b23, 0x3a322a22, 0x39312921, 0x38302820,
                                   0x1f170f07, 0x1e160e06, 0x1d150d05, 0x1c140c04,
                                   0x1b130b03, 0x1a120a02, 0x19110901, 0x18100800);
  return _mm512_permutexvar_epi8(order, x);
#else
  const V order = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  const V lanes = _mm512_set_epi32(15, 13, 11, 9, 14, 12, 10, 8, 7, 5, 3, 1, 6, 4, 2, 0);
  return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(lanes, x), order);
#endif
}
// The 16 entries at book + AT, in every 16 bytes. As assembly: GCC 12 loads all tables of a codebook before a loop, and
// brings each to all lanes in the loop, by shuffles.
template <int AT> LB_INLINE V in_lanes(const uint8_t* book) {
  V x;
  asm("vbroadcasti32x4 %c2(%1), %0" : "=v"(x) : "r"(book), "i"(AT), "m"(*(const uint8_t(*)[AT + 16])book));
  return x;
}
// The most entries of a table of bytes; those of larger tables are words, of two coordinates.
constexpr int kByteEntries = LB_BYTE_ENTRIES;
// The entry that each byte of `index` chooses from the SIZE at book + AT; there are none behind. Shuffles ignore bits 4
// to 6 of an index.
template <int SIZE, int AT> LB_INLINE V entry_of(V index, const uint8_t* book) {
  static_assert(SIZE <= kByteEntries, "more entries than bits of an index choose from");
#if LB_VBMI
  if constexpr (SIZE > 128) {
    return pick<7>(index, entry_of<128, AT>(index, book), entry_of<128, AT + 128>(index, book));
  } else if constexpr (SIZE > 64) {
    return _mm512_permutex2var_epi8(vload(book + AT), index, vload(book + AT + 64));
  } else if constexpr (SIZE > 16) {
    return _mm512_permutexvar_epi8(index, vload(book + AT));
  }
#else
  if constexpr (SIZE > 32) {
    return pick<5>(index, entry_of<32, AT>(index, book), entry_of<32, AT + 32>(index, book));
  } else if constexpr (SIZE > 16) {
    const V low = _mm512_shuffle_epi8(in_lanes<AT>(book), index);
    return _mm512_mask_shuffle_epi8(low, has_bit<4>(index), in_lanes<AT + 16>(book), index);
  }
#endif
  return _mm512_shuffle_epi8(in_lanes<AT>(book), index);
}

// The word that the low byte of each word of `index` chooses from the SIZE at book + AT, more than 64. Permutes read
// six bits of an index, so each finds one of 64 words. Where bit 6 or 7 is set, other words are not chosen, which would
// take a blend each, but differences from the words so far are added without carry (`put_table`), three terms at once.
template <int SIZE, int AT> LB_INLINE V words_of(V index, const uint8_t* book) {
  const auto has = [&](int bit) __attribute__((always_inline)) {
    return _mm512_test_epi16_mask(index, _mm512_set1_epi16(short(1 << bit)));
  };
  const auto piece = [&](__mmask32 chosen, int i) __attribute__((always_inline)) {
    const uint8_t* words = book + AT + 128 * i;
    return _mm512_maskz_permutex2var_epi16(chosen, vload(words), index, vload(words + 64));
  };
  const V first = _mm512_permutex2var_epi16(vload(book + AT), index, vload(book + AT + 64)), six = piece(has(6), 1);
  if constexpr (SIZE <= 128) {
    return _mm512_xor_si512(first, six);
  } else {
    const V three = _mm512_ternarylogic_epi32(first, six, piece(has(7), 2), 0x96);
    return _mm512_xor_si512(three, piece(has(6) & has(7), 3));
  }
}
// Two coordinates of a step: words found for the first and third columns, and for the others.
struct Words {
  V even, odd;
};
// What is looked up for two neighbouring coordinates at once, whose tables are at book + AT: nothing in tables of
// bytes, which are of one coordinate each.
template <int SIZE, int AT> LB_INLINE auto pair_of(V index, [[maybe_unused]] const uint8_t* book) {
  if constexpr (SIZE <= kByteEntries) {
    return index;
  } else {
    return Words{words_of<SIZE, AT>(index, book), words_of<SIZE, AT>(_mm512_srli_epi16(index, 8), book)};
  }
}
// The operand of the first or second of them.
template <int SIZE, int AT, int SECOND> LB_INLINE V operand_of(Words found, const uint8_t*) {
  const V low = set1(0x00ff00ffu);
  return SECOND ? _mm512_ternarylogic_epi32(found.odd, low, _mm512_srli_epi16(found.even, 8), 0xBA)
                : and_or(found.even, low, _mm512_slli_epi16(found.odd, 8));
}
