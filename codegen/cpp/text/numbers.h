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
