// 64 bytes from places of their own, ROW at each, and bytes or words of two vectors in turns, within 16-byte lanes.
template <int ROW> LB_INLINE __m128i lane_at(const uint8_t* book, const uint64_t* at) {
  if constexpr (ROW == 4) {
    int32_t x[4];
    for (int i = 0; i < 4; ++i) memcpy(x + i, book + at[i], 4);
    return _mm_set_epi32(x[3], x[2], x[1], x[0]);
  } else if constexpr (ROW == 8) {
    const __m128i low = _mm_loadl_epi64((const __m128i*)(book + at[0]));
    return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(low), (const __m64*)(book + at[1])));
  } else {
    return _mm_loadu_si128((const __m128i*)(book + at[0]));
  }
}
template <int ROW> LB_INLINE V rows_at(const uint8_t* book, const uint64_t* at) {
  constexpr int per = 16 / ROW;
  return {_mm256_set_m128i(lane_at<ROW>(book, at + per), lane_at<ROW>(book, at)),
          _mm256_set_m128i(lane_at<ROW>(book, at + 3 * per), lane_at<ROW>(book, at + 2 * per))};
}
// Sums of bytes, modulo 256.
LB_INLINE V add_levels(V x, V y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
template <int HIGH> LB_INLINE V zip_bytes(V a, V b) {
  return HIGH ? V{_mm256_unpackhi_epi8(a.a, b.a), _mm256_unpackhi_epi8(a.b, b.b)}
              : V{_mm256_unpacklo_epi8(a.a, b.a), _mm256_unpacklo_epi8(a.b, b.b)};
}
template <int HIGH> LB_INLINE V zip_words(V a, V b) {
  return HIGH ? V{_mm256_unpackhi_epi16(a.a, b.a), _mm256_unpackhi_epi16(a.b, b.b)}
              : V{_mm256_unpacklo_epi16(a.a, b.a), _mm256_unpacklo_epi16(a.b, b.b)};
}

// Indices of four columns of 8 vectors at `p` and of 8 more at `q`, sorted: 32-bit lane v has those of vector v.
LB_INLINE __m256i by_vector(const uint8_t* p) {
  const __m256i order = _mm256_broadcastsi128_si256(_mm_set_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400));
  const __m256i lanes = _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0);
  return _mm256_shuffle_epi8(_mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)p), lanes), order);
}
LB_INLINE V by_vector(const uint8_t* p, const uint8_t* q) { return {by_vector(p), by_vector(q)}; }
// An index that shuffles take as it is where it is one of 16 from FIRST on; elsewhere bit 7 is set, whose byte is 0.
template <int FIRST> LB_INLINE __m256i among(__m256i index) {
  const __m256i from = FIRST ? _mm256_xor_si256(index, _mm256_set1_epi8(FIRST)) : index;
  return _mm256_adds_epu8(from, _mm256_set1_epi8(0x70));
}
// The most entries of a table; and what is looked up for two neighbouring coordinates at once, whose tables are at
// book + AT: nothing.
constexpr int kByteEntries = LB_BYTE_ENTRIES;
template <int SIZE, int AT> LB_INLINE V pair_of(V index, const uint8_t*) { return index; }
// The entry that each byte of `index` chooses from the SIZE at book + AT, 16 at a time, from FIRST on; there are none
// behind.
template <int SIZE, int AT, int FIRST = 0> LB_INLINE V entry_of(V index, const uint8_t* book) {
  static_assert(SIZE <= kByteEntries, "for more entries loads are the shorter way");
  if constexpr (SIZE <= 16) {
    return lookup(index, book + AT);
  } else {
    const V here = lookup(V{among<FIRST>(index.a), among<FIRST>(index.b)}, book + AT + FIRST);
    if constexpr (FIRST + 16 >= SIZE) {
      return here;
    } else {
      return vor(here, entry_of<SIZE, AT, FIRST + 16>(index, book));
    }
  }
}
