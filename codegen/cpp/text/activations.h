// Activations of tokens [t0, t1), gathered, cut into chunks and, for integer products, rounded to int8 digits.
static void load_tokens(const Args& a, const XT* x, int64_t t0, int64_t t1, float* row) {
  for (int64_t t = t0; t < t1; ++t) {
    gather_row(a, x + t * kK, t, row);
#if LB_LIMBS
    round_row(a, row, t);
#if LB_VECTORS
    sum_rounded(a, t);
#endif
#endif
    for (int64_t c = 0; c < kChunkRows; ++c) {
      [[maybe_unused]] const int64_t at = c * a.m + t, from_chunk = c < kChunks ? c : c - kChunks;
      [[maybe_unused]] const int64_t n = chunk_columns(from_chunk);
      [[maybe_unused]] const float* from = row + chunk_start(from_chunk);
#if LB_LIMBS
#if LB_WORDS == 1
      Digit* to = a.xq + at * kTokenStride;
      for (int64_t i = 0; i < n; i += 4) {
        const Digit second = to[i + 1];
        to[i + 1] = to[i + 2], to[i + 2] = second;
      }
#elif LB_WORDS == 3
      Digit *to = a.xq + at * kTokenStride, pairs[2 * LB_HALF];
      for (int64_t i = 0; i < n; i += 2 * LB_HALF) {
        for (int64_t j = 0; j < LB_HALF; ++j) pairs[2 * j] = to[i + j], pairs[2 * j + 1] = to[i + LB_HALF + j];
        memcpy(to + i, pairs, sizeof(pairs));
      }
#elif LB_LUT
      look_ahead(a, at, n);
#endif
#elif LB_BF16_X
      // Floats that are bfloat16 numbers, in the order of columns 0, 2, 1, 3.
      uint16_t* to = a.xq + at * kTokenStride;
      for (int64_t i = 0; i < n; i += 4)
        for (int64_t j = 0; j < 2; ++j) {
          const uint32_t pair = lb_bits(from[i + j]) >> 16 | (lb_bits(from[i + j + 2]) & 0xffff0000u);
          memcpy(to + i + 2 * j, &pair, 4);
        }
#elif LB_PAIRS
      float* to = a.xq + at * kTokenStride;
      for (int64_t i = 0; i < n; i += 4) to[i] = from[i], to[i + 1] = from[i + 2], to[i + 2] = from[i + 1], to[i + 3] = from[i + 3];
#else
      memcpy(a.xq + at * kTokenStride, from, size_t(n) * 4);
#endif
    }
  }
}
