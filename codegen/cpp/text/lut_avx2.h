// Lookups of sums: 64 bytes hold one column of 16 rows each in four quarters, and every quarter has a table of its own.

// 16 rows x 4 columns as bytes -> 4 columns x 16 rows; rows of a column in the order 0-3, 8-11, 4-7, 12-15.
LB_INLINE V by_column(V x) {
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i low = _mm256_shuffle_epi8(x.a, order), high = _mm256_shuffle_epi8(x.b, order);
  return {_mm256_permute4x64_epi64(_mm256_unpacklo_epi32(low, high), 0xd8),
          _mm256_permute4x64_epi64(_mm256_unpackhi_epi32(low, high), 0xd8)};
}
template <int HALF> LB_INLINE V nibble(V x) { return vand(HALF ? shr<4>(x) : x, set1(0x0f0f0f0fu)); }

// Sums of entries' low and high bytes; two columns of 16 rows.
struct ByteSums {
  __m256i low, high;
};
LB_INLINE ByteSums no_bytes() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
LB_INLINE ByteSums look_up(ByteSums sums, V index, const uint8_t* table) {
  const __m256i* t = (const __m256i*)table;
  const __m256i low = _mm256_add_epi8(sums.low, _mm256_shuffle_epi8(_mm256_loadu_si256(t), index.a));
  const __m256i high = _mm256_add_epi8(sums.high, _mm256_shuffle_epi8(_mm256_loadu_si256(t + 2), index.a));
  return {_mm256_add_epi8(low, _mm256_shuffle_epi8(_mm256_loadu_si256(t + 1), index.b)),
          _mm256_add_epi8(high, _mm256_shuffle_epi8(_mm256_loadu_si256(t + 3), index.b))};
}

// Sums of entries as unsigned 16-bit numbers: two columns of rows 0-3 and 8-11, and of the others.
struct WordSums {
  __m256i a, b;
};
LB_INLINE WordSums no_words() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
// low + 2**LOW * high: bytes are below 256, and pairs of products below 2**15.
template <int LOW> LB_INLINE WordSums add_bytes(WordSums sums, ByteSums x) {
  const __m256i units = _mm256_set1_epi16((1 << (LOW + 8)) + 1);
  return {_mm256_add_epi16(sums.a, _mm256_maddubs_epi16(_mm256_unpacklo_epi8(x.low, x.high), units)),
          _mm256_add_epi16(sums.b, _mm256_maddubs_epi16(_mm256_unpackhi_epi8(x.low, x.high), units))};
}
LB_INLINE __m256i add_halves(__m256i x) {
  return _mm256_cvtepu16_epi32(_mm_add_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1)));
}
// Sums of 16 rows in order.
LB_INLINE V in_rows(WordSums x) {
  const __m256i a = add_halves(x.a), b = add_halves(x.b);
  return {_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
}

// 16 entries: OFFSET and, of CODES activations as pairs of 16-bit numbers, multiples of those at `columns`. The low bits
// and the others are bytes, 64 apart.
template <int CODES, int OFFSET, int LOW>
LB_INLINE void fill_table(const uint32_t* pairs, const int* columns, const int16_t (*factors)[16], uint8_t* to) {
  __m256i entries = _mm256_set1_epi16(OFFSET);
  for (int i = 0; i < CODES; ++i) {
    const __m256i factor = _mm256_loadu_si256((const __m256i*)factors[i]);
    const __m256i product = _mm256_mullo_epi16(_mm256_set1_epi32(int(pairs[columns[i]])), factor);
    entries = _mm256_add_epi16(entries, product);
  }
  const __m256i low = _mm256_and_si256(entries, _mm256_set1_epi16((1 << LOW) - 1));
  // Packing works within 128-bit halves: its quarters come out as low, high, low, high.
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(low, _mm256_srli_epi16(entries, LOW)), 0xd8);
  _mm_storeu_si128((__m128i*)to, _mm256_castsi256_si128(bytes));
  _mm_storeu_si128((__m128i*)(to + 64), _mm256_extracti128_si256(bytes, 1));
}
