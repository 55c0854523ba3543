// What linear kernels and attention share: rounding to integers, integers of 16 bits as two signed digits of 8, and
// rotation.

// The bits of the largest magnitude of x[n]. Magnitudes are compared as integers: the order is the same, infinities and
// NaN (0x7f800000 and above) come out on top, and the loop vectorizes.
LB_INLINE uint32_t largest_bits(const float* x, int64_t n) {
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t b = lb_bits(x[i]) & 0x7fffffff;
    most = b > most ? b : most;
  }
  return most;
}

// The least and the largest of x[n] and zero; where one is infinite or NaN, the range is.
struct Range {
  float low, high;
};
// A float's bits as an integer with the same order, and back: negative ones count down. Loops over it vectorize.
LB_INLINE int32_t in_order(uint32_t bits) { return int32_t(bits ^ (uint32_t(int32_t(bits) >> 31) & 0x7fffffff)); }
LB_INLINE Range range_of(const float* x, int64_t n) {
  int32_t low = 0, high = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t v = in_order(lb_bits(x[i]));
    low = v < low ? v : low;
    high = v > high ? v : high;
  }
  return {lb_float(uint32_t(in_order(uint32_t(low)))), lb_float(uint32_t(in_order(uint32_t(high))))};
}

// The nearest whole number of |x| < 2**22, ties to even: adding and taking away 1.5 * 2**23 rounds.
LB_INLINE float whole_number(float x) { return (x + 12582912.0f) - 12582912.0f; }

// The nearest integer of |x| < 2**22, ties to even: adding 1.5 * 2**23 rounds and leaves it in the low bits.
LB_INLINE int32_t nearest_int(float x) { return int32_t(lb_bits(x + 12582912.0f) - 0x4b400000u); }

// q = 256 * high + low, both in [-128, 127].
LB_INLINE int8_t high_digit(int32_t q) { return int8_t((q + 128) >> 8); }
LB_INLINE int8_t low_digit(int32_t q) { return int8_t(q); }

// Every N columns of x[n], N a power of two, times a Hadamard matrix, orthonormal with `unit` = N**-0.5: sums and
// differences at growing distance.
template <int64_t N> [[maybe_unused]] LB_INLINE void rotate_blocks(float* x, int64_t n, float unit) {
  for (float* b = x; b < x + n; b += N) {
    for (int64_t w = 1; w < N; w *= 2)
      for (int64_t i = 0; i < N; i += 2 * w)
        for (int64_t j = i; j < i + w; ++j) {
          const float low = b[j], high = b[j + w];
          b[j] = low + high, b[j + w] = low - high;
        }
    for (int64_t i = 0; i < N; ++i) b[i] *= unit;
  }
}
