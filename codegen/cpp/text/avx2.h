// AVX2 with FMA and F16C (with LB_VNNI also AVX-VNNI): a vector is two 32-byte registers.
#include <immintrin.h>

struct V {
  __m256i a, b;
};
struct F {
  __m256 a, b;
};

LB_INLINE V vload(const void* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
LB_INLINE void vstore(void* p, V x) {
  _mm256_storeu_si256((__m256i*)p, x.a);
  _mm256_storeu_si256((__m256i*)p + 1, x.b);
}
LB_INLINE V both(__m256i x) { return {x, x}; }
LB_INLINE V vzero() { return both(_mm256_setzero_si256()); }
LB_INLINE V set1(uint32_t x) { return both(_mm256_set1_epi32(int(x))); }
LB_INLINE V bcast4(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return both(_mm256_set1_epi32(x));
}
LB_INLINE V bcast8(const void* p) {
  int64_t x;
  memcpy(&x, p, 8);
  return both(_mm256_set1_epi64x(x));
}
template <int N> LB_INLINE V shr(V x) { return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)}; }
template <int N> LB_INLINE V shl(V x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
template <int N> LB_INLINE V sra(V x) { return {_mm256_srai_epi32(x.a, N), _mm256_srai_epi32(x.b, N)}; }
template <int N> LB_INLINE V sra16(V x) { return {_mm256_srai_epi16(x.a, N), _mm256_srai_epi16(x.b, N)}; }
LB_INLINE V vand(V x, V y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
LB_INLINE V vor(V x, V y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
LB_INLINE V and_or(V x, V mask, V y) { return vor(vand(x, mask), y); }
LB_INLINE V vadd(V x, V y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
LB_INLINE V madd16(V x, V y) { return {_mm256_madd_epi16(x.a, y.a), _mm256_madd_epi16(x.b, y.b)}; }
LB_INLINE V load_u8(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128((const __m128i*)p);
  return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
// table[index] for every byte: 0 where bit 7 of an index is set, else bits 4 to 6 do not count.
LB_INLINE V lookup(V index, const uint8_t* table) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table));
  return {_mm256_shuffle_epi8(t, index.a), _mm256_shuffle_epi8(t, index.b)};
}
// An index with bit 7 turned round; x with the signs of the bytes of y, none of which is 0.
LB_INLINE V other(V x) {
  const __m256i top = _mm256_set1_epi8(-128);
  return {_mm256_xor_si256(x.a, top), _mm256_xor_si256(x.b, top)};
}
LB_INLINE V signed_as(V x, V y) { return {_mm256_sign_epi8(x.a, y.a), _mm256_sign_epi8(x.b, y.b)}; }
// table[code] for every byte, of 64 entries; or what it was looked up as in pieces, where that is the shorter way.
LB_INLINE V at_once(V, const uint8_t*, V pieces) { return pieces; }
// Bytes of b where bit BIT of the byte of x is set, else of a; and top - a in the place of b.
template <int BIT> LB_INLINE V pick(V x, V a, V b) {
  const V by = shl<7 - BIT>(x);
  return {_mm256_blendv_epi8(a.a, b.a, by.a), _mm256_blendv_epi8(a.b, b.b, by.b)};
}
template <int BIT> LB_INLINE V reflect(V x, V a, V top) {
  return pick<BIT>(x, a, V{_mm256_sub_epi8(top.a, a.a), _mm256_sub_epi8(top.b, a.b)});
}

LB_INLINE F fset1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
LB_INLINE F fzero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
LB_INLINE F fload(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LB_INLINE void fstore(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
LB_INLINE F fadd(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
LB_INLINE F fsub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
LB_INLINE F fmul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
LB_INLINE F fma_(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
// The sum of all sixteen: halves are added until one is left.
LB_INLINE float fsum(F x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
LB_INLINE F cvt(V x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
LB_INLINE F bitcast(V x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
LB_INLINE F half(V x) {
  // Packing works within 128-bit halves: its quarters come out as a0, b0, a1, b1.
  const __m256i h = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
// Floats of the 16-bit lanes of rows 0 to 7, and of rows 8 to 15: two a row. Two floats for every
// row; then the first and the second of each row.
LB_INLINE F half_pairs(__m256i x) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}
LB_INLINE F half_low(V x) { return half_pairs(x.a); }
LB_INLINE F half_high(V x) { return half_pairs(x.b); }
LB_INLINE F fset2(const float* p) {
  double x;
  memcpy(&x, p, 8);
  const __m256 y = _mm256_castpd_ps(_mm256_set1_pd(x));
  return {y, y};
}
// A shuffle within 128-bit halves leaves rows 0, 1, 4, 5, 2, 3, 6, 7.
LB_INLINE __m256 in_order(__m256 x) {
  return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(x), 0xd8));
}
LB_INLINE F evens(F low, F high) {
  return {in_order(_mm256_shuffle_ps(low.a, low.b, 0x88)), in_order(_mm256_shuffle_ps(high.a, high.b, 0x88))};
}
LB_INLINE F odds(F low, F high) {
  return {in_order(_mm256_shuffle_ps(low.a, low.b, 0xdd)), in_order(_mm256_shuffle_ps(high.a, high.b, 0xdd))};
}
LB_INLINE F load_f16(const void* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
}
LB_INLINE __m256 half_bf16(const void* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
LB_INLINE F load_bf16(const void* p) { return {half_bf16(p), half_bf16((const __m128i*)p + 1)}; }
// Powers of two (the smallest, 2**-127, is a subnormal float: half the next one's bits); e4m3 divided by 256, which leaves them float16.
LB_INLINE F load_e8m0(const uint8_t* p) {
  const V power = shl<23>(load_u8(p)), least = set1(0x00400000u);
  return bitcast({_mm256_max_epu32(power.a, least.a), _mm256_max_epu32(power.b, least.b)});
}
LB_INLINE F load_e4m3(const uint8_t* p) {
  const __m256i h = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p)), 7);
  return half_pairs(_mm256_and_si256(h, _mm256_set1_epi16(short(0xbfff))));
}
LB_INLINE void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
LB_INLINE void prefetch_far(const void* p) { prefetch(p); }
template <int N> LB_INLINE F lut(V x, const float* table) {
  return {_mm256_i32gather_ps(table, x.a, 4), _mm256_i32gather_ps(table, x.b, 4)};
}

// Compilers that form all products of a tile before they add them up, or load what they are made of again for each, run
// out of registers or of loads.
LB_INLINE V kept(V x) {
  asm volatile("" : "+x"(x.a), "+x"(x.b));
  return x;
}
LB_INLINE __m256i dot_half(__m256i acc, __m256i codes, __m256i x) {
#if LB_VNNI
  return _mm256_dpbusd_avx_epi32(acc, codes, x);
#elif LB_CODE_TOP < 128
  // Pairs stay within 2 * 127 * 128 < 2**15, so the saturating 16-bit sum never saturates.
  const __m256i pairs = _mm256_maddubs_epi16(codes, x);
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
#else
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(codes, _mm256_set1_epi32(0x00ff00ff)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(codes, 8), _mm256_srai_epi16(x, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
#endif
}
#if LB_CODE_TOP < 128
// acc + sums of 2 products in each 16-bit lane; acc + sums of 2 such sums in each 32-bit lane.
LB_INLINE V dot_pairs(V acc, V codes, V x) {
  return kept({_mm256_add_epi16(acc.a, _mm256_maddubs_epi16(codes.a, x.a)),
               _mm256_add_epi16(acc.b, _mm256_maddubs_epi16(codes.b, x.b))});
}
template <int BY = 1> LB_INLINE V add_pairs(V acc, V sums) { return vadd(acc, madd16(sums, set1(BY << 16 | BY))); }
#endif
// acc + sum of 4 unsigned codes x 4 signed activations in each 32-bit lane, exact.
LB_INLINE V dot(V acc, V codes, V x) { return kept({dot_half(acc.a, codes.a, x.a), dot_half(acc.b, codes.b, x.b)}); }
// The even or odd bytes as 16-bit numbers; the entry of a table of 32 that the lowest five bits of each choose, and
// this negated where bit BIT is set; acc + sum of 2 products in each 32-bit lane, exact.
template <int ODD> LB_INLINE V word(V x) {
  return ODD ? V{_mm256_srli_epi16(x.a, 8), _mm256_srli_epi16(x.b, 8)} : vand(x, set1(0x00ff00ffu));
}
template <int ODD> LB_INLINE V lane(V x) { return word<ODD>(x); }
template <int BIT> LB_INLINE V signed_word_of(V x, const int16_t* table) {
  uint16_t codes[32];
  int16_t y[32];
  vstore(codes, x);
  for (int i = 0; i < 32; ++i) y[i] = int16_t(codes[i] >> BIT & 1 ? -table[codes[i] & 31] : table[codes[i] & 31]);
  return vload(y);
}
// The 16-bit numbers FACTOR * high + low of signed bytes, as unpacking leaves them: four columns of rows 0, 1, 4 and 5 of
// each register, or of rows 2, 3, 6 and 7 (REST); then the first two (HALF 0) or the last two columns of every row.
template <int FACTOR, int REST> LB_INLINE V unsorted_words_of(V high, V low) {
  const __m256i factors = _mm256_set1_epi16(FACTOR << 8 | 1);
  const auto words = [&](__m256i h, __m256i l) __attribute__((always_inline)) {
    return _mm256_maddubs_epi16(factors, REST ? _mm256_unpackhi_epi8(l, h) : _mm256_unpacklo_epi8(l, h));
  };
  return {words(high.a, low.a), words(high.b, low.b)};
}
template <int FACTOR, int HALF> LB_INLINE V words_of(V high, V low) {
  const F first = bitcast(unsorted_words_of<FACTOR, 0>(high, low)), rest = bitcast(unsorted_words_of<FACTOR, 1>(high, low));
  return {_mm256_castps_si256(_mm256_shuffle_ps(first.a, rest.a, HALF ? 0xdd : 0x88)),
          _mm256_castps_si256(_mm256_shuffle_ps(first.b, rest.b, HALF ? 0xdd : 0x88))};
}
// Sums of unsorted words, two of 32 bits a row: what they add up to, in the order of rows.
LB_INLINE V sorted_sums(V first, V rest) {
  return {_mm256_hadd_epi32(first.a, rest.a), _mm256_hadd_epi32(first.b, rest.b)};
}
LB_INLINE V word_of(V x, const int16_t* table) { return signed_word_of<15>(x, table); }
LB_INLINE V dot16(V acc, V codes, V x) {
#if LB_VNNI
  return {_mm256_dpwssd_avx_epi32(acc.a, codes.a, x.a), _mm256_dpwssd_avx_epi32(acc.b, codes.b, x.b)};
#else
  return kept(vadd(acc, madd16(codes, x)));
#endif
}
