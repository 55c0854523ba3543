// The values + 128 of trellis states in 16-bit lanes: the lower 32 bits of state * A, of which the four bytes are added
// up and DROP bits dropped. A state times a number of 16 bits is two products of 16 bits, of 32 bits three.
template <uint32_t A, int DROP> LB_INLINE __m256i byte_sums(__m256i s) {
  const __m256i low = _mm256_set1_epi16(short(A & 0xffff)), high = _mm256_set1_epi16(short(A >> 16));
  const __m256i ones = _mm256_set1_epi8(1);
  const __m256i first = _mm256_mullo_epi16(s, low);
  __m256i second = _mm256_mulhi_epu16(s, low);
  if (A >> 16) second = _mm256_add_epi16(second, _mm256_mullo_epi16(s, high));
  const __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(first, ones), _mm256_maddubs_epi16(second, ones));
  return _mm256_srli_epi16(sums, DROP);
}
template <uint32_t A, int DROP> LB_INLINE V byte_sums(V s) {
  return {byte_sums<A, DROP>(s.a), byte_sums<A, DROP>(s.b)};
}
