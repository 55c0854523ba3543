// Activations of one token for vector formats: in stored column order, with column norms applied. `shift` is what the
// other half of the norms needs: the sum of x * norm bias (columns) or of x (rows).
LB_INLINE void gather_row(const Args& a, const XT* x, int64_t t, float* row) {
  for (int64_t i = 0; i < kK; ++i) row[i] = from_x(x[stored_column(a, i)]);
#if LB_NORM
  F sum = fzero();
  float rest = 0.0f;
  int64_t i = 0;
  for (; i + 16 <= kK; i += 16) {
    const F v = fload(row + i);
#if LB_NORM == 1
    sum = fma_(v, fload(a.norm_bias + i), sum);
    fstore(row + i, fmul(v, fload(a.norm_scale + i)));
#else
    sum = fadd(sum, v);
#endif
  }
  for (; i < kK; ++i) {
#if LB_NORM == 1
    rest += row[i] * a.norm_bias[i];
    row[i] *= a.norm_scale[i];
#else
    rest += row[i];
#endif
  }
  alignas(64) float part[16];
  fstore(part, sum);
  for (int j = 0; j < 16; ++j) rest += part[j];
  a.shift[t] = rest;
#endif
}
#if LB_LIMBS
// Norms of rows add the sum of what is multiplied: of the rounded activations.
LB_INLINE void sum_rounded([[maybe_unused]] const Args& a, [[maybe_unused]] int64_t t) {
#if LB_NORM == 2
  float sum = 0.0f;
  for (int64_t c = 0; c < kChunks; ++c) sum += a.xo[c * a.m + t];
  a.shift[t] = sum;
#endif
}
#endif
