// Sums of entries of tables, for 64 rows at once: entries are 16-bit words, which permutes of registers choose.

constexpr int kEntryBytes = 2;

// The bits of the largest magnitude so far: compared as integers their order is the same, with NaN on top.
struct Most {
  V bits;
};
LB_INLINE Most no_most() { return {vzero()}; }
LB_INLINE void take(Most& most, F x) {
  most.bits = _mm512_max_epu32(most.bits, vand(_mm512_castps_si512(x), set1(0x7fffffffu)));
}
LB_INLINE uint32_t bits_of(const Most& most) { return _mm512_reduce_max_epu32(most.bits); }

// Words of rows 0, 2 .. 62 and of rows 1, 3 .. 63; 32-bit sums of rows 0, 4 .., of rows 2, 6 .., of 1, 5 .., of 3, 7 ..
// With permutes of bytes words of the lower and of the upper eight of each 16 rows; 32-bit sums of every other of these.
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

#if LB_VBMI
// Where the lowest bytes of 32 numbers of 32 bits are, and behind these the second ones.
struct BytesAt {
  alignas(64) uint8_t at[64];
  constexpr BytesAt() : at() {
    for (int i = 0; i < 64; ++i) at[i] = uint8_t(i % 32 * 4 + i / 32);
  }
};
constexpr BytesAt kBytesAt;

// The table of SIZE entries: their low bytes, then their high ones. What is added moves whole steps, in two's complement,
// to the lowest bits of a float.
template <int SIZE> LB_INLINE void put_entries(const float* from, float inverse, uint8_t* to) {
  const F unit = fset1(inverse), shift = fset1(12582912.0f);
  const V at = vload(kBytesAt.at);
  for (int j = 0; j < SIZE; j += 32) {
    const V low = _mm512_castps_si512(fma_(fload(from + j), unit, shift));
    const V high = _mm512_castps_si512(fma_(fload(from + j + 16), unit, shift));
    const V bytes = _mm512_permutex2var_epi8(low, at, high);
    _mm256_storeu_si256((__m256i*)(to + j), _mm512_castsi512_si256(bytes));
    _mm256_storeu_si256((__m256i*)(to + (SIZE < 32 ? 32 : SIZE) + j), _mm512_extracti64x4_epi64(bytes, 1));
  }
}

// A table in registers, of low bytes and of high ones; both in one where they fit.
template <int SIZE> struct Table {
  V v[SIZE <= 32 ? 1 : SIZE / 32];
};
template <int SIZE> LB_INLINE Table<SIZE> table_at(const uint8_t* from) {
  Table<SIZE> table;
#pragma GCC unroll 8
  for (V& part : table.v) {
    part = vload(from), from += 64;
    asm("" : "+v"(part));  // GCC would load it again for every use
  }
  return table;
}

// The byte that each byte of `x` chooses; `seven`: where this bit of it is set. Permutes read the bits of an index
// below: six of them in one register of bytes, seven in two.
template <int PARTS> LB_INLINE V byte_for(V x, [[maybe_unused]] __mmask64 seven, const V* table) {
  if constexpr (PARTS == 1) {
    return _mm512_permutexvar_epi8(x, table[0]);
  } else if constexpr (PARTS == 2) {
    return _mm512_permutex2var_epi8(table[0], x, table[1]);
  } else {
    return _mm512_mask_blend_epi8(seven, byte_for<2>(x, seven, table), byte_for<2>(x, seven, table + 2));
  }
}

// Adds the entries that 64 indices choose: the halves of each 16 rows to `even` and `odd`.
template <int SIZE> LB_INLINE void look_up(Found& found, const uint8_t* index, const Table<SIZE>& table) {
  constexpr int parts = SIZE <= 64 ? 1 : SIZE / 64;
  const V x = vload(index);
  const __mmask64 seven = parts > 2 ? _mm512_movepi8_mask(x) : 0;
  const V low = byte_for<parts>(x, seven, table.v);
  const V high = SIZE <= 32 ? byte_for<1>(vor(x, set1(0x20202020u)), 0, table.v) : byte_for<parts>(x, seven, table.v + (SIZE <= 32 ? 0 : parts));
  found.even = _mm512_add_epi16(found.even, _mm512_unpacklo_epi8(low, high));
  found.odd = _mm512_add_epi16(found.odd, _mm512_unpackhi_epi8(low, high));
}
#else
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

template <int SIZE> LB_INLINE const uint8_t* table_at(const uint8_t* from) { return from; }

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
#endif

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
#if LB_VBMI
    const int first = j / 4 * 16 + j % 4 * 2;
    rows[first] = y[j], rows[first + 1] = y[16 + j];
    rows[first + 8] = y[32 + j], rows[first + 9] = y[48 + j];
  }
}
#else
    rows[4 * j] = y[j], rows[4 * j + 2] = y[16 + j];
    rows[4 * j + 1] = y[32 + j], rows[4 * j + 3] = y[48 + j];
  }
}
#endif
