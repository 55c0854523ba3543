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
    V x = _mm512_set1_epi64(row(0));
#pragma GCC unroll 8
    for (int i = 1; i < 8; ++i) x = _mm512_mask_set1_epi64(x, __mmask8(1 << i), row(i));
    return x;
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
template <int HIGH> LB_INLINE V zip_bytes(V a, V b) {
  return HIGH ? _mm512_unpackhi_epi8(a, b) : _mm512_unpacklo_epi8(a, b);
}
template <int HIGH> LB_INLINE V zip_words(V a, V b) {
  return HIGH ? _mm512_unpackhi_epi16(a, b) : _mm512_unpacklo_epi16(a, b);
}
