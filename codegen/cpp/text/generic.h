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
LB_INLINE F cvt(V x) { return __builtin_convertvector(x, F); }
LB_INLINE F bitcast(V x) { return F(x); }
LB_INLINE F half(V x) {
  F y;
  for (int i = 0; i < 16; ++i) y[i] = from_f16(uint16_t(x[i]));
  return y;
}
LB_INLINE F load_f16(const void* p) {
  uint16_t h[16];
  memcpy(h, p, 32);
  F x;
  for (int i = 0; i < 16; ++i) x[i] = from_f16(h[i]);
  return x;
}
LB_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
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
