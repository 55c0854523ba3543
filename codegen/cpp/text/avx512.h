// AVX-512 (F, BW, DQ, VL; with LB_VNNI also VNNI): a vector is one 64-byte register.
#include <immintrin.h>

typedef __m512i V;
typedef __m512 F;

LB_INLINE V vload(const void* p) { return _mm512_loadu_si512(p); }
LB_INLINE void vstore(void* p, V x) { _mm512_storeu_si512(p, x); }
LB_INLINE V vzero() { return _mm512_setzero_si512(); }
LB_INLINE V set1(uint32_t x) { return _mm512_set1_epi32(int(x)); }
LB_INLINE V bcast4(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
template <int N> LB_INLINE V shr(V x) { return _mm512_srli_epi32(x, N); }
template <int N> LB_INLINE V shl(V x) {
  // Whole bytes: a shuffle, which no multiplication waits for.
  const V up = _mm512_set4_epi32(0x0e0d0c80, 0x0a090880, 0x06050480, 0x02010080);
  return N == 8 ? _mm512_shuffle_epi8(x, up) : _mm512_slli_epi32(x, N);
}
template <int N> LB_INLINE V sra(V x) { return _mm512_srai_epi32(x, N); }
template <int N> LB_INLINE V sra16(V x) { return _mm512_srai_epi16(x, N); }
LB_INLINE V vand(V x, V y) { return _mm512_and_si512(x, y); }
LB_INLINE V vor(V x, V y) { return _mm512_or_si512(x, y); }
LB_INLINE V and_or(V x, V mask, V y) { return _mm512_ternarylogic_epi32(x, mask, y, 0xEA); }
LB_INLINE V vadd(V x, V y) { return _mm512_add_epi32(x, y); }
LB_INLINE V madd16(V x, V y) { return _mm512_madd_epi16(x, y); }
LB_INLINE V load_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
// table[index] for every byte; the upper four bits of an index are zero.
LB_INLINE V lookup(V index, const uint8_t* table) {
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)table)), index);
}
// table[code] for every byte, of 64 entries; or what it was looked up as in pieces, where that is the shorter way.
LB_INLINE V at_once([[maybe_unused]] V code, [[maybe_unused]] const uint8_t* table, [[maybe_unused]] V pieces) {
#if LB_VBMI
  return _mm512_permutexvar_epi8(code, vload(table));
#else
  return pieces;
#endif
}
// Bytes of b where bit BIT of the byte of x is set, else of a; and top - a in the place of b.
template <int BIT> LB_INLINE __mmask64 has_bit(V x) { return _mm512_test_epi8_mask(x, set1(0x01010101u << BIT)); }
template <int BIT> LB_INLINE V pick(V x, V a, V b) { return _mm512_mask_blend_epi8(has_bit<BIT>(x), a, b); }
template <int BIT> LB_INLINE V reflect(V x, V a, V top) { return _mm512_mask_sub_epi8(a, has_bit<BIT>(x), top, a); }

LB_INLINE F fzero() { return _mm512_setzero_ps(); }
LB_INLINE F fset1(float x) { return _mm512_set1_ps(x); }
LB_INLINE F fload(const float* p) { return _mm512_loadu_ps(p); }
LB_INLINE void fstore(float* p, F x) { _mm512_storeu_ps(p, x); }
LB_INLINE F fadd(F x, F y) { return _mm512_add_ps(x, y); }
LB_INLINE F fsub(F x, F y) { return _mm512_sub_ps(x, y); }
LB_INLINE F fmul(F x, F y) { return _mm512_mul_ps(x, y); }
LB_INLINE F fma_(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
// The sum of all sixteen: halves are added until one is left.
LB_INLINE float fsum(F x) { return _mm512_reduce_add_ps(x); }
LB_INLINE F cvt(V x) { return _mm512_cvtepi32_ps(x); }
LB_INLINE F bitcast(V x) { return _mm512_castsi512_ps(x); }
LB_INLINE F half(V x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
// Floats of the 16-bit lanes of rows 0 to 7, and of rows 8 to 15: two a row. Two floats for every
// row; then the first and the second of each row.
LB_INLINE F half_low(V x) { return _mm512_cvtph_ps(_mm512_castsi512_si256(x)); }
LB_INLINE F half_high(V x) { return _mm512_cvtph_ps(_mm512_extracti64x4_epi64(x, 1)); }
LB_INLINE F fset2(const float* p) {
  double x;
  memcpy(&x, p, 8);
  return _mm512_castpd_ps(_mm512_set1_pd(x));
}
LB_INLINE F evens(F low, F high) {
  const V at = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return _mm512_permutex2var_ps(low, at, high);
}
LB_INLINE F odds(F low, F high) {
  const V at = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_ps(low, at, high);
}
LB_INLINE F load_bf16(const void* p) {
  const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
}
LB_INLINE F load_f16(const void* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
// Powers of two (the smallest, 2**-127, is a subnormal float: half the next one's bits); e4m3 divided by 256, which leaves them float16.
LB_INLINE F load_e8m0(const uint8_t* p) {
  return bitcast(_mm512_max_epu32(shl<23>(load_u8(p)), set1(0x00400000u)));
}
LB_INLINE F load_e4m3(const uint8_t* p) {
  const __m256i h = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  return _mm512_cvtph_ps(_mm256_and_si256(h, _mm256_set1_epi16(short(0xbfff))));
}
LB_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
// Of the streams of weights, far ahead. Processors with VBMI (measured on Zen 4) wait for more lines on their way to the
// second-level cache than to the first.
LB_INLINE void prefetch_far(const void* p) { _mm_prefetch((const char*)p, LB_VBMI ? _MM_HINT_T1 : _MM_HINT_T0); }

// N is a power of two; codes index the table directly.
template <int N> LB_INLINE F lut(V x, const float* table) {
  if (N <= 16) {
    return _mm512_permutexvar_ps(x, _mm512_maskz_loadu_ps(__mmask16((1u << (N & 31)) - 1), table));
  }
  return N == 32 ? _mm512_permutex2var_ps(fload(table), x, fload(table + (N == 32 ? 16 : 0)))
                 : _mm512_i32gather_ps(x, table, 4);
}

// The even or odd bytes as 16-bit numbers, or with anything above them; the entry of a table of 32 that the lowest five
// bits of each choose, and this negated where bit BIT is set (the fifth; negated entries lie behind the others); acc + sum
// of 2 products in each 32-bit lane, exact.
template <int ODD> LB_INLINE V word(V x) {
  return ODD ? _mm512_srli_epi16(x, 8) : vand(x, set1(0x00ff00ffu));
}
template <int ODD> LB_INLINE V lane(V x) { return ODD ? _mm512_srli_epi16(x, 8) : x; }
LB_INLINE V word_of(V x, const int16_t* table) { return _mm512_permutexvar_epi16(x, vload(table)); }
template <int BIT> LB_INLINE V signed_word_of(V x, const int16_t* table) {
  static_assert(BIT == 5, "the bit that a permute of two registers reads after those of one");
#if LB_VBMI
  return _mm512_permutex2var_epi16(vload(table), x, vload(table + 32));  // three operations on Cascade Lake, one on Zen 4
#else
  const V y = word_of(x, table);
  return _mm512_mask_sub_epi16(y, _mm512_test_epi16_mask(x, set1(0x00010001u << BIT)), vzero(), y);
#endif
}
#if !LB_VNNI
// As in `avx2.h`; with VNNI dot products are assembly.
LB_INLINE V kept(V x) {
  asm volatile("" : "+v"(x));
  return x;
}
#endif
LB_INLINE V dot16(V acc, V codes, V x) {
#if LB_VNNI
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
  return acc;
#else
  return kept(vadd(acc, madd16(codes, x)));
#endif
}

#if LB_BF16
// table[index] for every byte, of 128 entries that the lowest seven bits of each choose; the even or odd bytes of two
// vectors, side by side.
LB_INLINE V byte_of(V x, const uint8_t* table) { return _mm512_permutex2var_epi8(vload(table), x, vload(table + 64)); }
template <int ODD> LB_INLINE V joined(V high, V low) {
  return ODD ? and_or(high, set1(0xff00ff00u), _mm512_srli_epi16(low, 8))
             : and_or(low, set1(0x00ff00ffu), _mm512_slli_epi16(high, 8));
}
// acc + sum of 2 products of bfloat16 numbers in each 32-bit lane.
LB_INLINE F dot_bf16(F acc, V w, V x) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
  return acc;
}
// Both of each pair times the row's scale, where that is a bfloat16 number again.
LB_INLINE V scaled(V pairs, F scale) {
  const V high = set1(0xffff0000u);
  const F low_ones = fmul(bitcast(shl<16>(pairs)), scale), high_ones = fmul(bitcast(vand(pairs, high)), scale);
  return and_or(_mm512_castps_si512(high_ones), high, shr<16>(_mm512_castps_si512(low_ones)));
}
#endif

#if LB_CODE_TOP < 128
// acc + sums of 2 products in each 16-bit lane; acc + sums of 2 such sums in each 32-bit lane.
LB_INLINE V dot_pairs(V acc, V codes, V x) { return kept(_mm512_add_epi16(acc, _mm512_maddubs_epi16(codes, x))); }
template <int BY = 1> LB_INLINE V add_pairs(V acc, V sums) { return vadd(acc, madd16(sums, set1(BY << 16 | BY))); }
#endif
// acc + sum of 4 unsigned codes x 4 signed activations in each 32-bit lane, exact.
LB_INLINE V dot(V acc, V codes, V x) {
#if LB_VNNI
  // As assembly: GCC 12 copies and spills the accumulators of the intrinsic when many are live.
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(codes), "v"(x));
  return acc;
#elif LB_CODE_TOP < 128
  // Pairs stay within 2 * 127 * 128 < 2**15, so the saturating 16-bit sum never saturates.
  return kept(vadd(acc, madd16(_mm512_maddubs_epi16(codes, x), _mm512_set1_epi16(1))));
#else
  const V even = madd16(vand(codes, set1(0x00ff00ff)), _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8));
  const V odd = madd16(_mm512_srli_epi16(codes, 8), _mm512_srai_epi16(x, 8));
  return kept(vadd(acc, vadd(even, odd)));
#endif
}
