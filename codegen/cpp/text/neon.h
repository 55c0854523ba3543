// AArch64 Advanced SIMD (with LB_DOT also its byte dot products): a vector is four 16-byte registers.
#include <arm_neon.h>

struct V {
  int32x4_t r[4];
};
struct F {
  float32x4_t r[4];
};

// One operation on all four registers; `i` counts them.
template <typename T, typename G> LB_INLINE T each(G g) { return {{g(0), g(1), g(2), g(3)}}; }
LB_INLINE int8x16_t as_s8(int32x4_t x) { return vreinterpretq_s8_s32(x); }
LB_INLINE uint8x16_t as_u8(int32x4_t x) { return vreinterpretq_u8_s32(x); }
LB_INLINE int16x8_t as_s16(int32x4_t x) { return vreinterpretq_s16_s32(x); }
LB_INLINE uint32x4_t as_u32(int32x4_t x) { return vreinterpretq_u32_s32(x); }

LB_INLINE V vload(const void* p) {
  return each<V>([&](int i) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)p + 16 * i)); });
}
LB_INLINE void vstore(void* p, V x) {
  for (int i = 0; i < 4; ++i) vst1q_u8((uint8_t*)p + 16 * i, as_u8(x.r[i]));
}
LB_INLINE V both(int32x4_t x) { return {{x, x, x, x}}; }
LB_INLINE V vzero() { return both(vdupq_n_s32(0)); }
LB_INLINE V set1(uint32_t x) { return both(vdupq_n_s32(int32_t(x))); }
LB_INLINE V bcast4(const void* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return both(vdupq_n_s32(x));
}
// Counts are never 0: shifts that move nothing are not printed.
template <int N> LB_INLINE V shr(V x) {
  return each<V>([&](int i) { return vreinterpretq_s32_u32(vshrq_n_u32(as_u32(x.r[i]), N)); });
}
template <int N> LB_INLINE V shl(V x) {
  return each<V>([&](int i) { return vshlq_n_s32(x.r[i], N); });
}
template <int N> LB_INLINE V sra(V x) {
  return each<V>([&](int i) { return vshrq_n_s32(x.r[i], N); });
}
template <int N> LB_INLINE V sra16(V x) {
  return each<V>([&](int i) { return vreinterpretq_s32_s16(vshrq_n_s16(as_s16(x.r[i]), N)); });
}
LB_INLINE V vand(V x, V y) { return each<V>([&](int i) { return vandq_s32(x.r[i], y.r[i]); }); }
LB_INLINE V vor(V x, V y) { return each<V>([&](int i) { return vorrq_s32(x.r[i], y.r[i]); }); }
LB_INLINE V and_or(V x, V mask, V y) { return vor(vand(x, mask), y); }
LB_INLINE V vadd(V x, V y) { return each<V>([&](int i) { return vaddq_s32(x.r[i], y.r[i]); }); }
LB_INLINE V madd16(V x, V y) {
  return each<V>([&](int i) {
    const int16x8_t a = as_s16(x.r[i]), b = as_s16(y.r[i]);
    return vpaddq_s32(vmull_s16(vget_low_s16(a), vget_low_s16(b)), vmull_high_s16(a, b));
  });
}
LB_INLINE V load_u8(const uint8_t* p) {
  const uint8x16_t x = vld1q_u8(p);
  const uint16x8_t a = vmovl_u8(vget_low_u8(x)), b = vmovl_high_u8(x);
  return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(a))), vreinterpretq_s32_u32(vmovl_high_u16(a)),
           vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(b))), vreinterpretq_s32_u32(vmovl_high_u16(b))}};
}
// table[index] for every byte; the upper four bits of an index are zero.
LB_INLINE V lookup(V index, const uint8_t* table) {
  const uint8x16_t t = vld1q_u8(table);
  return each<V>([&](int i) { return vreinterpretq_s32_u8(vqtbl1q_u8(t, as_u8(index.r[i]))); });
}
// table[code] for every byte, of 64 entries; or what it was looked up as in pieces, where that is the shorter way.
LB_INLINE V at_once(V, const uint8_t*, V pieces) { return pieces; }
// Bytes of b where bit BIT of the byte of x is set, else of a; and top - a in the place of b.
template <int BIT> LB_INLINE V pick(V x, V a, V b) {
  return each<V>([&](int i) {
    const uint8x16_t set = vtstq_u8(as_u8(x.r[i]), vdupq_n_u8(1 << BIT));
    return vreinterpretq_s32_u8(vbslq_u8(set, as_u8(b.r[i]), as_u8(a.r[i])));
  });
}
template <int BIT> LB_INLINE V reflect(V x, V a, V top) {
  const V b = each<V>([&](int i) { return vreinterpretq_s32_u8(vsubq_u8(as_u8(top.r[i]), as_u8(a.r[i]))); });
  return pick<BIT>(x, a, b);
}

LB_INLINE F fset1(float x) { return each<F>([&](int) { return vdupq_n_f32(x); }); }
LB_INLINE F fzero() { return fset1(0.0f); }
LB_INLINE F fload(const float* p) { return each<F>([&](int i) { return vld1q_f32(p + 4 * i); }); }
LB_INLINE void fstore(float* p, F x) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, x.r[i]);
}
LB_INLINE F fadd(F x, F y) { return each<F>([&](int i) { return vaddq_f32(x.r[i], y.r[i]); }); }
LB_INLINE F fsub(F x, F y) { return each<F>([&](int i) { return vsubq_f32(x.r[i], y.r[i]); }); }
LB_INLINE F fmul(F x, F y) { return each<F>([&](int i) { return vmulq_f32(x.r[i], y.r[i]); }); }
LB_INLINE F fma_(F x, F y, F z) { return each<F>([&](int i) { return vfmaq_f32(z.r[i], x.r[i], y.r[i]); }); }
// The sum of all sixteen: halves are added until one is left.
LB_INLINE float fsum(F x) {
  const float32x4_t four = vaddq_f32(vaddq_f32(x.r[0], x.r[2]), vaddq_f32(x.r[1], x.r[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
LB_INLINE F cvt(V x) { return each<F>([&](int i) { return vcvtq_f32_s32(x.r[i]); }); }
LB_INLINE F bitcast(V x) { return each<F>([&](int i) { return vreinterpretq_f32_s32(x.r[i]); }); }
LB_INLINE float32x4_t from_halves(uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
LB_INLINE F half(V x) { return each<F>([&](int i) { return from_halves(vmovn_u32(as_u32(x.r[i]))); }); }
// Floats of the 16-bit lanes of rows 0 to 7, and of rows 8 to 15: two a row. Two floats for every
// row; then the first and the second of each row.
LB_INLINE F half_pairs(int32x4_t x, int32x4_t y) {
  const uint16x8_t a = vreinterpretq_u16_s32(x), b = vreinterpretq_u16_s32(y);
  return {{from_halves(vget_low_u16(a)), from_halves(vget_high_u16(a)), from_halves(vget_low_u16(b)),
           from_halves(vget_high_u16(b))}};
}
LB_INLINE F half_low(V x) { return half_pairs(x.r[0], x.r[1]); }
LB_INLINE F half_high(V x) { return half_pairs(x.r[2], x.r[3]); }
LB_INLINE F fset2(const float* p) {
  const float32x2_t x = vld1_f32(p);
  return each<F>([&](int) { return vcombine_f32(x, x); });
}
LB_INLINE F evens(F x, F y) {
  return {{vuzp1q_f32(x.r[0], x.r[1]), vuzp1q_f32(x.r[2], x.r[3]), vuzp1q_f32(y.r[0], y.r[1]),
           vuzp1q_f32(y.r[2], y.r[3])}};
}
LB_INLINE F odds(F x, F y) {
  return {{vuzp2q_f32(x.r[0], x.r[1]), vuzp2q_f32(x.r[2], x.r[3]), vuzp2q_f32(y.r[0], y.r[1]),
           vuzp2q_f32(y.r[2], y.r[3])}};
}
LB_INLINE F load_f16(const void* p) {
  return each<F>([&](int i) { return from_halves(vld1_u16((const uint16_t*)p + 4 * i)); });
}
LB_INLINE F load_bf16(const void* p) {
  return each<F>([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16((const uint16_t*)p + 4 * i), 16)); });
}
// Powers of two (the smallest, 2**-127, is a subnormal float: half the next one's bits); e4m3 divided by 256, which
// leaves them float16.
LB_INLINE F load_e8m0(const uint8_t* p) {
  const V x = load_u8(p);
  return each<F>([&](int i) {
    return vreinterpretq_f32_u32(vmaxq_u32(vshlq_n_u32(as_u32(x.r[i]), 23), vdupq_n_u32(0x00400000)));
  });
}
LB_INLINE F load_e4m3(const uint8_t* p) {
  const V x = load_u8(p);
  return half(vor(vand(shl<8>(x), set1(0x8000)), vand(shl<7>(x), set1(0x3f80))));
}
LB_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
LB_INLINE void prefetch_far(const void* p) { prefetch(p); }
template <int N> LB_INLINE F lut(V x, const float* table) {
  int32_t at[16];
  float y[16];
  vstore(at, x);
  for (int i = 0; i < 16; ++i) y[i] = table[at[i]];
  return fload(y);
}

LB_INLINE int32x4_t dot_signed(int32x4_t acc, int8x16_t a, int8x16_t b) {
#if LB_DOT
  return vdotq_s32(acc, a, b);
#else
  // Products of bytes fit in 16 bits; neighbours are added as 32 bits, twice.
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b))), high = vpaddlq_s16(vmull_high_s8(a, b));
  return vaddq_s32(acc, vpaddq_s32(low, high));
#endif
}
// acc + sum of 4 unsigned codes x 4 signed activations in each 32-bit lane, exact. Codes from 128 on are taken as 128
// less than they are, and 128 times the activations are added.
LB_INLINE V dot(V acc, V codes, V x) {
  return each<V>([&](int i) {
    const int8x16_t c = as_s8(codes.r[i]), y = as_s8(x.r[i]);
#if LB_CODE_TOP < 128
    return dot_signed(acc.r[i], c, y);
#else
    const int32x4_t sum = dot_signed(acc.r[i], veorq_s8(c, vdupq_n_s8(-128)), y);
    return vsubq_s32(sum, dot_signed(vdupq_n_s32(0), y, vdupq_n_s8(-128)));
#endif
  });
}
// The even or odd bytes as 16-bit numbers; the entry of a table of 32 that the lowest five bits of each choose, and
// this negated where bit BIT is set; acc + sum of 2 products in each 32-bit lane, exact.
template <int ODD> LB_INLINE V word(V x) {
  return each<V>([&](int i) {
    const uint16x8_t y = vreinterpretq_u16_s32(x.r[i]);
    return vreinterpretq_s32_u16(ODD ? vshrq_n_u16(y, 8) : vandq_u16(y, vdupq_n_u16(255)));
  });
}
template <int ODD> LB_INLINE V lane(V x) { return word<ODD>(x); }
template <int BIT> LB_INLINE V signed_word_of(V x, const int16_t* table) {
  uint16_t codes[32];
  int16_t y[32];
  vstore(codes, x);
  for (int i = 0; i < 32; ++i) y[i] = int16_t(codes[i] >> BIT & 1 ? -table[codes[i] & 31] : table[codes[i] & 31]);
  return vload(y);
}
LB_INLINE V word_of(V x, const int16_t* table) { return signed_word_of<15>(x, table); }
LB_INLINE V dot16(V acc, V codes, V x) { return vadd(acc, madd16(codes, x)); }
