// Matrices that are not quantized: y = x @ w.T (+ bias) (+ residual), weights [n, k] in rows.
struct Bf16 {
  uint16_t bits;
};
LB_INLINE F load_w(const float* p) { return fload(p); }
LB_INLINE F load_w(const uint16_t* p) { return load_f16(p); }
LB_INLINE F load_w(const Bf16* p) { return load_bf16(p); }
LB_INLINE float one_w(float x) { return x; }
LB_INLINE float one_w(uint16_t x) { return from_f16(x); }
LB_INLINE float one_w(Bf16 x) { return from_bf16(x.bits); }

// Products of columns that are no whole vector.
template <typename W>
static __attribute__((noinline)) float dense_rest(const W* w, const float* x, int64_t n) {
  float sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) sum += one_w(w[i]) * x[i];
  return sum;
}

// Results of R rows, `gap` rows apart, and T tokens, from row `row` and token `t` on. The order of a sum is the same
// for all R and T.
template <typename W, int R, int T>
LB_INLINE void dense_tile(const Linear& l, const float* x, int64_t row, int64_t gap, int64_t t, const float* residual,
                          float* out) {
  const W* w = (const W*)l.dense + row * l.k;
  x += t * l.k;
  F acc[T][R];
  for (int j = 0; j < T; ++j)
    for (int r = 0; r < R; ++r) acc[j][r] = fzero();
  int64_t i = 0;
  for (; i + 16 <= l.k; i += 16) {
    F v[T];
    for (int j = 0; j < T; ++j) v[j] = fload(x + j * l.k + i);
    for (int r = 0; r < R; ++r) {
      const F u = load_w(w + r * gap * l.k + i);
      for (int j = 0; j < T; ++j) acc[j][r] = fma_(u, v[j], acc[j][r]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < T; ++j)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      float sum = fsum(acc[j][r]);
      if (i < l.k) sum += dense_rest(w + r * gap * l.k + i, x + j * l.k + i, l.k - i);
      const int64_t to = row + r * gap, at = (t + j) * l.n + to;
      if (l.bias) sum += l.bias[to];
      out[at] = residual ? sum + residual[at] : sum;
    }
}

// Rows [row, row + rows) for tokens [t0, t1). R rows far from each other are read at a time: one stream of addresses
// leaves the memory system half idle.
template <typename W, int R, int T>
static void dense_rows(const Linear& l, const float* x, int64_t row, int64_t rows, int64_t t0, int64_t t1,
                       const float* residual, float* out) {
  const int64_t gap = rows / R, end = row + rows;
  int64_t r = row;
  for (; r < row + gap; ++r) {
    int64_t t = t0;
    for (; t + T <= t1; t += T) dense_tile<W, R, T>(l, x, r, gap, t, residual, out);
    for (; t < t1; ++t) dense_tile<W, R, 1>(l, x, r, gap, t, residual, out);
  }
  for (r = row + gap * R; r < end; ++r)
    for (int64_t t = t0; t < t1; ++t) dense_tile<W, 1, 1>(l, x, r, 0, t, residual, out);
}

// Few tokens stay in the nearest cache while all weights pass; for many, blocks of rows stay in the next one.
template <typename W>
static void dense(const Linear& l, const float* x, int64_t m, const float* residual, float* out, int threads) {
  const bool few = m <= 8;
  if (l.n * l.k * m < (1 << 17)) threads = 1;
  const int64_t block = few ? (l.n + threads - 1) / threads : 48, pass = few ? m : kDenseTokens;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t b = 0; b < (l.n + block - 1) / block; ++b) {
    const int64_t row = b * block, rows = row + block <= l.n ? block : l.n - row;
    for (int64_t t = 0; t < m; t += pass) {
      const int64_t end = t + pass < m ? t + pass : m;
      if (m == 1) dense_rows<W, 4, 1>(l, x, row, rows, t, end, residual, out);
      else dense_rows<W, kDenseRows, kDenseTokens>(l, x, row, rows, t, end, residual, out);
    }
  }
}
