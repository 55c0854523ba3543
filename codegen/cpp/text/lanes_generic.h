// Vectors of 4, 8 and 16 floats, for centroids: the last is the instruction set's own F.
typedef float F4 __attribute__((vector_size(16)));
typedef float F8 __attribute__((vector_size(32)));
typedef F F16;

LB_INLINE F4 zero4() { return F4{}; }
LB_INLINE F8 zero8() { return F8{}; }
LB_INLINE F16 zero16() { return fzero(); }
LB_INLINE F4 set4(float x) { return F4{} + x; }
LB_INLINE F8 set8(float x) { return F8{} + x; }
LB_INLINE F16 set16(float x) { return fset1(x); }
LB_INLINE F4 load4(const float* p) {
  F4 x;
  memcpy(&x, p, 16);
  return x;
}
LB_INLINE F8 load8(const float* p) {
  F8 x;
  memcpy(&x, p, 32);
  return x;
}
LB_INLINE F16 load16(const float* p) { return fload(p); }
LB_INLINE F4 load4(const uint16_t* p) {
  F4 x;
  for (int i = 0; i < 4; ++i) x[i] = from_f16(p[i]);
  return x;
}
LB_INLINE F8 load8(const uint16_t* p) {
  F8 x;
  for (int i = 0; i < 8; ++i) x[i] = from_f16(p[i]);
  return x;
}
LB_INLINE F16 load16(const uint16_t* p) { return load_f16(p); }
LB_INLINE void store(float* p, F4 x) { memcpy(p, &x, 16); }
LB_INLINE void store(float* p, F8 x) { memcpy(p, &x, 32); }
LB_INLINE void store(float* p, F16 x) { fstore(p, x); }
LB_INLINE F4 fadd(F4 x, F4 y) { return x + y; }
LB_INLINE F8 fadd(F8 x, F8 y) { return x + y; }
LB_INLINE F4 fma_(F4 x, F4 y, F4 z) { return x * y + z; }
LB_INLINE F8 fma_(F8 x, F8 y, F8 z) { return x * y + z; }
