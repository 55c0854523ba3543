// As in `trellis_avx2.h`.
template <uint32_t A, int DROP> LB_INLINE V byte_sums(V s) {
  const V low = _mm512_set1_epi16(short(A & 0xffff)), high = _mm512_set1_epi16(short(A >> 16));
  const V ones = _mm512_set1_epi8(1), first = _mm512_mullo_epi16(s, low);
  V second = _mm512_mulhi_epu16(s, low);
  if (A >> 16) second = _mm512_add_epi16(second, _mm512_mullo_epi16(s, high));
  const V sums = _mm512_add_epi16(_mm512_maddubs_epi16(first, ones), _mm512_maddubs_epi16(second, ones));
  return _mm512_srli_epi16(sums, DROP);
}
