// Matrices that are not quantized: y = x @ w.T (+ bias) (+ residual), weights [n, k] in rows.
LB_INLINE F load_w(const float* p) { return fload(p); }
LB_INLINE F load_w(const uint16_t* p) { return load_f16(p); }
LB_INLINE float one_w(float x) { return x; }
LB_INLINE float one_w(uint16_t x) { return from_f16(x); }

template <typename W, int R>
LB_INLINE void dense_rows(const W* w, const float* x, int64_t k, float* sums) {
  F acc[R];
  for (int r = 0; r < R; ++r) acc[r] = fzero();
  int64_t i = 0;
  for (; i + 16 <= k; i += 16) {
    const F v = fload(x + i);
    for (int r = 0; r < R; ++r) acc[r] = fma_(load_w(w + r * k + i), v, acc[r]);
  }
  for (int r = 0; r < R; ++r) {
    sums[r] = fsum(acc[r]);
    for (int64_t j = i; j < k; ++j) sums[r] += one_w(w[r * k + j]) * x[j];
  }
}

template <typename W>
static void dense(const Linear& l, const float* x, int64_t m, const float* residual, float* out, int threads) {
  const W* w = (const W*)l.dense;
  const int64_t blocks = (l.n + 7) / 8;
  if (l.n * l.k * m < (1 << 17)) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t row = b * 8, rows = row + 8 <= l.n ? 8 : l.n - row;
    for (int64_t t = 0; t < m; ++t) {
      float sums[8];
      if (rows == 8) dense_rows<W, 8>(w + row * l.k, x + t * l.k, l.k, sums);
      else for (int64_t r = 0; r < rows; ++r) dense_rows<W, 1>(w + (row + r) * l.k, x + t * l.k, l.k, sums + r);
      for (int64_t r = 0; r < rows; ++r) {
        const float y = sums[r] + (l.bias ? l.bias[row + r] : 0.0f);
        out[t * l.n + row + r] = residual ? y + residual[t * l.n + row + r] : y;
      }
    }
  }
}
