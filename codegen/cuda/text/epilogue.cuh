// From sums to the stored output: bias, silu-mul, residual.

LB_DEV float narrow_float(const void* p, size_t i) {
  if constexpr (T::OUT == 0) return half_float(((const uint16_t*)p)[i]);
  if constexpr (T::OUT == 1) return bfloat_float(((const uint16_t*)p)[i]);
  return ((const float*)p)[i];
}

LB_DEV void store(void* p, size_t i, float v) {
  if constexpr (T::OUT == 0)
    ((uint16_t*)p)[i] = float_half(v);
  else if constexpr (T::OUT == 1)
    ((uint16_t*)p)[i] = float_bfloat(v);
  else
    ((float*)p)[i] = v;
}

#if LB_ROWS_OUT
// What `store` would leave, as a float.
LB_DEV float as_stored(float v) {
  return T::OUT == 0 ? half_float(float_half(v)) : T::OUT == 1 ? bfloat_float(float_bfloat(v)) : v;
}

#endif
LB_DEV float biased(const Args& a, const Place& p, float v, int token) {
  v = whole_rows(a, p, v, token);
  if constexpr (T::BIAS) v += a.bias[p.column()];
  return v;
}

// The sums of one token and row; of the row's gate and up where they are multiplied.
#if LB_ROWS_OUT
// Gives the number; zero beyond the last row.
LB_DEV float finish(const Args& a, int set, int row, int token, float v, float up) {
  const Place p = place_of(set, row);
  if (p.tile >= T::TILES || !p.inside()) return 0.0f;
#else
LB_DEV void finish(const Args& a, int set, int row, int token, float v, float up) {
  const Place p = place_of(set, row);
  if (p.tile >= T::TILES || !p.inside()) return;
#endif
  v = biased(a, p, v, token);
  if constexpr (T::GATED) v = v / (1.0f + exponential(-v)) * biased(a, place_of(set, row + T::TILE_ROWS), up, token);
  const size_t at = (size_t)token * T::N_OUT + (T::GATED ? p.row : p.column());
  if constexpr (T::RESIDUAL_ADD) v += narrow_float(a.residual, at);
#if LB_ROWS_OUT
  return as_stored(v);
#else
  store(a.out, at, v);
#endif
}
