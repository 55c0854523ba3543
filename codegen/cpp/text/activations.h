// Activations of tokens [t0, t1), gathered, cut into chunks and, for integer products, rounded to int8 digits.
static void load_tokens(const Args& a, const XT* x, int64_t t0, int64_t t1, float* row) {
  for (int64_t t = t0; t < t1; ++t) {
    gather_row(a, x + t * kK, t, row);
    for (int64_t c = 0; c < kChunks; ++c) {
      const int64_t at = c * a.m + t, n = chunk_columns(c);
      const float* from = row + chunk_start(c);
#if LB_LIMBS
      round_chunk(from, n, a.xq + at * kTokenStride, a.xs + at, a.xi + at, a.xo + at);
#else
      memcpy(a.xq + at * kTokenStride, from, size_t(n) * 4);
#endif
    }
  }
}
