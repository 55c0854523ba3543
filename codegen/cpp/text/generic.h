// Any little-endian machine: GCC and clang vector types, which the compiler splits into what the machine has.
typedef int32_t V __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef float F __attribute__((vector_size(64)));

LB_INLINE V vload(const void* p) {
  V x;
  memcpy(&x, p, 64);
  return x;
}
LB_INLINE void vstore(void* p, V x) { memcpy(p, &x, 64); }
LB_INLINE V vzero() { return V{}; }
LB_INLINE V set1(uint32_t x) { return V{} + int32_t(x); }
LB_INLINE V bcast4(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return V{} + x;
}
template <int N> LB_INLINE V shr(V x) { return V(U(x) >> N); }
template <int N> LB_INLINE V shl(V x) { return V(U(x) << N); }
template <int N> LB_INLINE V sra(V x) { return x >> N; }
template <int N> LB_INLINE V sra16(V x) {
  typedef int16_t S __attribute__((vector_size(64)));
  return V(S(x) >> N);
}
LB_INLINE V vand(V x, V y) { return x & y; }
LB_INLINE V vor(V x, V y) { return x | y; }
LB_INLINE V and_or(V x, V mask, V y) { return (x & mask) | y; }
LB_INLINE V vadd(V x, V y) { return x + y; }
LB_INLINE V madd16(V x, V y) { return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16); }
LB_INLINE V load_u8(const uint8_t* p) {
  V x;
  for (int i = 0; i < 16; ++i) x[i] = p[i];
  return x;
}
// table[index] for every byte; the upper four bits of an index are zero.
LB_INLINE V lookup(V index, const uint8_t* table) {
  uint8_t b[64];
  memcpy(b, &index, 64);
  for (int i = 0; i < 64; ++i) b[i] = table[b[i]];
  return vload(b);
}
// table[code] for every byte, of 64 entries; or what it was looked up as in pieces, where that is the shorter way.
LB_INLINE V at_once(V, const uint8_t*, V pieces) { return pieces; }
// Bytes of b where bit BIT of the byte of x is set, else of a; and top - a in the place of b.
template <int BIT> LB_INLINE V pick(V x, V a, V b) {
  const V all = (shr<BIT>(x) & 0x01010101) * 255;
  return (b & all) | (a & ~all);
}
template <int BIT> LB_INLINE V reflect(V x, V a, V top) {
  typedef int8_t B __attribute__((vector_size(64)));
  return pick<BIT>(x, a, V(B(top) - B(a)));
}

LB_INLINE F fset1(float x) { return F{} + x; }
LB_INLINE F fzero() { return F{}; }
LB_INLINE F fload(const float* p) {
  F x;
  memcpy(&x, p, 64);
  return x;
}
LB_INLINE void fstore(float* p, F x) { memcpy(p, &x, 64); }
LB_INLINE F fadd(F x, F y) { return x + y; }
LB_INLINE F fsub(F x, F y) { return x - y; }
LB_INLINE F fmul(F x, F y) { return x * y; }
LB_INLINE F fma_(F x, F y, F z) { return x * y + z; }
// The sum of all sixteen: halves are added until one is left.
LB_INLINE float fsum(F x) {
  for (int w = 8; w; w /= 2)
    for (int i = 0; i < w; ++i) x[i] += x[i + w];
  return x[0];
}
LB_INLINE F cvt(V x) { return __builtin_convertvector(x, F); }
LB_INLINE F bitcast(V x) { return F(x); }
LB_INLINE F half(V x) {
  F y;
  for (int i = 0; i < 16; ++i) y[i] = from_f16(uint16_t(x[i]));
  return y;
}
// Floats of the 16-bit lanes of rows 0 to 7, and of rows 8 to 15: two a row. Two floats for every
// row; then the first and the second of each row.
LB_INLINE F half_pairs(const V& x, int first) {
  uint16_t h[32];
  memcpy(h, &x, 64);
  F y;
  for (int i = 0; i < 16; ++i) y[i] = from_f16(h[first + i]);
  return y;
}
LB_INLINE F half_low(V x) { return half_pairs(x, 0); }
LB_INLINE F half_high(V x) { return half_pairs(x, 16); }
LB_INLINE F fset2(const float* p) {
  F y;
  for (int i = 0; i < 16; ++i) y[i] = p[i % 2];
  return y;
}
LB_INLINE F evens(F low, F high) {
  F y;
  for (int i = 0; i < 8; ++i) y[i] = low[2 * i], y[8 + i] = high[2 * i];
  return y;
}
LB_INLINE F odds(F low, F high) {
  F y;
  for (int i = 0; i < 8; ++i) y[i] = low[2 * i + 1], y[8 + i] = high[2 * i + 1];
  return y;
}
template <typename G> LB_INLINE F load_halves(const void* p, G from) {
  uint16_t h[16];
  memcpy(h, p, 32);
  F x;
  for (int i = 0; i < 16; ++i) x[i] = from(h[i]);
  return x;
}
LB_INLINE F load_bf16(const void* p) { return load_halves(p, from_bf16); }
LB_INLINE F load_f16(const void* p) { return load_halves(p, from_f16); }
// Powers of two (the smallest, 2**-127, is a subnormal float: half the next one's bits); e4m3 divided by 256, which leaves them float16.
LB_INLINE F load_e8m0(const uint8_t* p) {
  const V power = shl<23>(load_u8(p));
  return bitcast(power | ((power == 0) & 0x00400000));
}
LB_INLINE F load_e4m3(const uint8_t* p) {
  const V x = load_u8(p);
  return half(vor(vand(shl<8>(x), set1(0x8000)), vand(shl<7>(x), set1(0x3f80))));
}
LB_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
LB_INLINE void prefetch_far(const void* p) { prefetch(p); }
template <int N> LB_INLINE F lut(V x, const float* table) {
  F y;
  for (int i = 0; i < 16; ++i) y[i] = table[x[i]];
  return y;
}

// acc + sum of 4 unsigned codes x 4 signed activations in each 32-bit lane, exact. 16-bit products keep SSE2's
// multiply-add in reach: even and odd bytes are widened by shifts and summed as 32-bit lanes.
LB_INLINE V dot(V acc, V codes, V x) {
  typedef int16_t S __attribute__((vector_size(64)));
  typedef uint16_t T __attribute__((vector_size(64)));
  const V even = madd16(V(S(codes) & 255), V((S(x) << 8) >> 8));
  const V odd = madd16(V(T(codes) >> 8), V(S(x) >> 8));
  return acc + even + odd;
}
// The even or odd bytes as 16-bit numbers; the entry of a table of 32 that the lowest five bits of each choose, and
// this negated where bit BIT is set; acc + sum of 2 products in each 32-bit lane, exact.
template <int ODD> LB_INLINE V word(V x) { return vand(ODD ? shr<8>(x) : x, set1(0x00ff00ffu)); }
template <int ODD> LB_INLINE V lane(V x) { return word<ODD>(x); }
template <int BIT> LB_INLINE V signed_word_of(V x, const int16_t* table) {
  uint16_t codes[32];
  int16_t y[32];
  vstore(codes, x);
  for (int i = 0; i < 32; ++i) y[i] = int16_t(codes[i] >> BIT & 1 ? -table[codes[i] & 31] : table[codes[i] & 31]);
  return vload(y);
}
LB_INLINE V word_of(V x, const int16_t* table) { return signed_word_of<15>(x, table); }
LB_INLINE V dot16(V acc, V codes, V x) { return V(U(acc) + U(madd16(codes, x))); }
