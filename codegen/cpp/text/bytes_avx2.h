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
template <int HIGH> LB_INLINE V zip_bytes(V a, V b) {
  return HIGH ? V{_mm256_unpackhi_epi8(a.a, b.a), _mm256_unpackhi_epi8(a.b, b.b)}
              : V{_mm256_unpacklo_epi8(a.a, b.a), _mm256_unpacklo_epi8(a.b, b.b)};
}
template <int HIGH> LB_INLINE V zip_words(V a, V b) {
  return HIGH ? V{_mm256_unpackhi_epi16(a.a, b.a), _mm256_unpackhi_epi16(a.b, b.b)}
              : V{_mm256_unpacklo_epi16(a.a, b.a), _mm256_unpacklo_epi16(a.b, b.b)};
}
