// What every instruction set shares: number conversions, the sigmoid, and the arguments of a call.
#include <cstdint>
#include <cstring>
#include <omp.h>

#define LB_INLINE static inline __attribute__((always_inline))

// A value that is to be in registers from here on, for instruction sets whose compilers need to be told.
template <typename T> LB_INLINE T kept(T x) { return x; }

LB_INLINE float lb_float(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
LB_INLINE uint32_t lb_bits(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

LB_INLINE float from_bf16(uint16_t h) { return lb_float(uint32_t(h) << 16); }

// Round to nearest even; a NaN stays a NaN (its payload may lie in the bits that are cut off).
LB_INLINE uint16_t to_bf16(float f) {
  const uint32_t b = lb_bits(f);
  const uint32_t rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  return uint16_t((b & 0x7fffffff) > 0x7f800000 ? (b >> 16) | 0x40 : rounded);
}

// Subnormals are scaled by a float subtraction, everything else by moving the exponent.
LB_INLINE float from_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  const uint32_t normal = (rest << 13) + ((127u - 15u) << 23);
  const float tiny = lb_float((rest << 13) + (113u << 23)) - lb_float(113u << 23);
  const uint32_t inf = (rest << 13) | 0x7f800000;
  const uint32_t value = rest >= 0x7c00 ? inf : rest < 0x0400 ? lb_bits(tiny) : normal;
  return lb_float(sign | value);
}

LB_INLINE uint16_t to_f16(float f) {
  const uint32_t b = lb_bits(f), a = b & 0x7fffffff;
  const uint32_t sign = (b >> 16) & 0x8000;
  // Below 2**-14 the sum with 0.5 leaves the rounded multiple of 2**-24 in the low bits.
  const uint32_t tiny = lb_bits(lb_float(a) + 0.5f) - lb_bits(0.5f);
  const uint32_t normal = (a - ((127u - 15u) << 23) + 0xfff + ((a >> 13) & 1)) >> 13;
  const uint32_t special = a > 0x7f800000 ? 0x7e00 : 0x7c00;
  return uint16_t(sign | (a >= 0x477ff000 ? special : a < 0x38800000 ? tiny : normal));
}

// e**x to about 2 ulp for |x| < 87: split off the power of two, then a polynomial of degree 6.
LB_INLINE float lb_exp(float x) {
  x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return lb_float(lb_bits(p) + ((lb_bits(shifted) - 0x4b400000u) << 23));
}
LB_INLINE float lb_silu(float x) {
  const float y = x / (1.0f + lb_exp(-x));
  return x == x ? y : x;
}

// Index number V of a word of them, times 2**SHIFT: one rotation and one mask.
template <int BITS, int V, int SHIFT> LB_INLINE uint64_t index_at(uint64_t w) {
  constexpr int by = (V * BITS - SHIFT) & 63;
  return (w >> by | w << (-by & 63)) & (((uint64_t(1) << BITS) - 1) << SHIFT);
}

// Arguments of a call, whatever the format; the weight's own follow in `Args`.
struct Call {
  const float* bias;
  const void* residual;
  void* out;
  int64_t m;
};
