// Sums of entries of tables, for 64 rows at once: entries are 16-bit words, which permutes of registers choose.

constexpr bool kWords = true;
constexpr int kEntryBytes = 2;

// Words of rows 0, 2 .. 62 and of rows 1, 3 .. 63; 32-bit sums of rows 0, 4 .., of rows 2, 6 .., of 1, 5 .., of 3, 7 ..
struct Found {
  V even, odd;
};
struct Sums {
  V v[4];
};
LB_INLINE Found no_found() { return {vzero(), vzero()}; }
LB_INLINE Sums no_sums() { return {{vzero(), vzero(), vzero(), vzero()}}; }

// The step that entries are counted in, so that sums of as much as `most` (the bits of a float) fit a word with what
// rounding adds, and its inverse. What is not finite makes all sums NaN.
LB_INLINE float scale_for(uint32_t most, float& inverse) {
  const float largest = lb_float(most);
  if (!(largest - largest == 0.0f)) return lb_float(0x7fc00000);
  inverse = largest > 1e-30f ? 32760.0f / largest : 0.0f;
  return largest > 1e-30f ? largest / 32760.0f : 0.0f;
}

// 32 floats in steps, as words.
LB_INLINE V words_at(const float* from, F inverse) {
  const V low = _mm512_cvtps_epi32(fmul(fload(from), inverse)), high = _mm512_cvtps_epi32(fmul(fload(from + 16), inverse));
  return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), _mm512_packs_epi32(low, high));
}
// The table of SIZE entries.
template <int SIZE> LB_INLINE void put_entries(const float* from, float inverse, uint8_t* to) {
  const F unit = fset1(inverse);
  for (int j = 0; j < SIZE; j += 32) vstore(to + 2 * j, words_at(from + j, unit));
}

// The word that the low byte of each word of `index` chooses; `six` and `seven`: where these bits of it are set.
// Permutes read the bits of an index below: five of them in one register of words, six in two.
template <int SIZE>
LB_INLINE V word_for(V index, [[maybe_unused]] __mmask32 six, [[maybe_unused]] __mmask32 seven, const uint8_t* table) {
  if constexpr (SIZE <= 32) {
    return _mm512_permutexvar_epi16(index, vload(table));
  } else if constexpr (SIZE <= 64) {
    return _mm512_permutex2var_epi16(vload(table), index, vload(table + 64));
  } else if constexpr (SIZE <= 128) {
    const V low = word_for<64>(index, six, seven, table);
    return _mm512_mask_blend_epi16(six, low, word_for<64>(index, six, seven, table + 128));
  } else {
    const V low = word_for<128>(index, six, seven, table);
    return _mm512_mask_blend_epi16(seven, low, word_for<128>(index, six, seven, table + 256));
  }
}

// Adds the entries that 64 indices choose.
template <int SIZE> LB_INLINE void look_up(Found& found, const uint8_t* index, const uint8_t* table) {
  const V x = vload(index);
  const auto bit = [&](int up) __attribute__((always_inline)) { return _mm512_movepi16_mask(_mm512_slli_epi16(x, up)); };
  __mmask32 six_even = 0, seven_even = 0, six_odd = 0, seven_odd = 0;
  if constexpr (SIZE > 64) six_even = bit(9), six_odd = bit(1);
  if constexpr (SIZE > 128) seven_even = bit(8), seven_odd = _mm512_movepi16_mask(x);
  found.even = _mm512_add_epi16(found.even, word_for<SIZE>(x, six_even, seven_even, table));
  found.odd = _mm512_add_epi16(found.odd, word_for<SIZE>(_mm512_srli_epi16(x, 8), six_odd, seven_odd, table));
}

// Words go on as 32-bit sums.
LB_INLINE void add_up(Sums& sums, Found& found) {
  const V low = set1(0x00000001u), high = set1(0x00010000u);
  sums.v[0] = dot16(sums.v[0], found.even, low), sums.v[1] = dot16(sums.v[1], found.even, high);
  sums.v[2] = dot16(sums.v[2], found.odd, low), sums.v[3] = dot16(sums.v[3], found.odd, high);
  found = no_found();
}

// Adds a chunk's sums to those at `y`, and these in the order of rows.
LB_INLINE void put_sums(float* y, const Sums& sums, const Found&, float scale) {
  for (int i = 0; i < 4; ++i) fstore(y + 16 * i, fma_(cvt(sums.v[i]), fset1(scale), fload(y + 16 * i)));
}
LB_INLINE void in_order(const float* y, float* rows) {
  for (int j = 0; j < 16; ++j) {
    rows[4 * j] = y[j], rows[4 * j + 2] = y[16 + j];
    rows[4 * j + 1] = y[32 + j], rows[4 * j + 3] = y[48 + j];
  }
}
