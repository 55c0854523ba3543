// Tables of the sums that codes pick out of one token's activations.

// Tables of one digit of `n` activations at `x` -> `to`; what the sums over all of them are too large by, in every plane.
LB_INLINE int32_t fill_tables(const int8_t* x, int64_t n, uint8_t* to) {
  int32_t sum = 0, more = 0;
  for (int64_t b = 0; b < n; b += 32) {
    uint32_t pairs[32];
    for (int i = 0; i < 32; ++i) {
      sum += x[b + i];
      pairs[i] = (uint32_t(x[b + i]) & 0xffff) | uint32_t(x[b + i]) << 16;
    }
    for (const LutStep& step : kLutSteps) {
      for (int j = 0; j < 4; ++j) {
        if (kLutWidths[step.plane] == 1)
          fill_table<4, kLutOffset, kLutLowBits>(pairs + j, step.columns, kLutFactors1, to + 16 * j);
        else
          fill_table<2, kLutOffset, kLutLowBits>(pairs + j, step.columns, kLutFactors2, to + 16 * j);
      }
      to += kLutTableBytes;
      more += (4 * kLutOffset) << kLutShifts[step.plane];
    }
  }
  for (int p = 0; p < kLutPlanes; ++p) more -= sum * kLutCentres[p] * (1 << kLutShifts[p]);
  return more;
}

// The tables of row `at` of the prepared activations, which has `n` columns.
LB_INLINE void look_ahead(const Args& a, int64_t at, int64_t n) {
  for (int64_t d = 0; d < LB_LIMBS; ++d)
    a.excess[at * LB_LIMBS + d] =
        fill_tables(a.xq + at * kTokenStride + d * kChunkCols, n, a.tables + (at * LB_LIMBS + d) * kLutBytes);
}
