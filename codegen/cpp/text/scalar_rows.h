// Activations of one token for scalar formats: gathered into the packed column order, then rounded chunk by chunk.

// Row of the matrix -> float32 in packed column order, zeros in padding.
LB_INLINE void gather_row(const Args&, const XT* x, int64_t, float* row) {
  for (int64_t g = 0; g < kGroups; ++g) {
    const int64_t from = g * kGroup, n = from + kGroup < kK ? kGroup : kK - from;
    float* to = row + g * kGroupCols;
    const int64_t end = g + 1 < kGroups ? kGroupCols : kBlocks * 32 - g * kGroupCols;
    for (int64_t i = 0; i < n; ++i) to[i] = from_x(x[from + i]);
    for (int64_t i = n; i < end; ++i) to[i] = 0.0f;
  }
}

#if LB_LIMBS
// The largest magnitude becomes 127 (one digit) or 127 * 256 + 127 (two). A chunk that is all below 1e-30 counts as
// zero (its reciprocal would overflow); one with an infinity or NaN gets the scale NaN, and so does its output.
// Magnitudes are compared as integers: the order is the same and the loop vectorizes.
// Sums are taken for each of the chunk's kParts scale groups, `stride` apart. kLevelUnit, a power of two, is what the
// weight's integers count.
LB_INLINE void round_chunk(const float* row, int64_t n, int8_t* digits, float* scale, int32_t* init,
                           float* total, int64_t stride) {
  constexpr float top = LB_LIMBS == 1 ? 127.0f : 32639.0f;
  uint32_t most = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t b = lb_bits(row[i]) & 0x7fffffff;
    most = b > most ? b : most;
  }
  const bool finite = most < 0x7f800000;
  const float largest = lb_float(most);
  const float inverse = finite && largest > 1e-30f ? top / largest : 0.0f;
  const float step = !finite ? lb_float(0x7fc00000) : inverse == 0.0f ? 0.0f : largest / top;
  *scale = step * kLevelUnit;
  for (int64_t p = 0; p < kParts; ++p) {
    int32_t sum = 0;
    for (int64_t i = p * n / kParts; i < (p + 1) * n / kParts; ++i) {
      const float x = finite ? row[i] : 0.0f;
      // Adding 1.5 * 2**23 rounds to nearest even and leaves the integer in the low bits.
      const int32_t q = int32_t(lb_bits(x * inverse + 12582912.0f) - 0x4b400000u);
      sum += q;
#if LB_LIMBS == 1
      digits[i] = int8_t(q);
#else
      digits[i] = int8_t((q + 128) >> 8);
      digits[i + kChunkCols] = int8_t(q);
#endif
    }
    total[p * stride] = float(sum) * step;
#if LB_ZERO
    // -sum as the pair (-low, -high) with sum = 128 * high + low; see zero_pair.
    const int32_t high = (sum + 64) >> 7, low = sum - high * 128;
    init[p * stride] = int32_t((uint32_t(-low) & 0xffff) | (uint32_t(-high) << 16));
#else
    init[p * stride] = -kBias * sum;
#endif
  }
}
#endif
