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

LB_DEV float biased(const Args& a, const Place& p, float v, int token) {
  v = whole_rows(a, p, v, token);
  if constexpr (T::BIAS) v += a.bias[p.column()];
  return v;
}

// The sums of one token and row; of the row's gate and up where they are multiplied.
LB_DEV void finish(const Args& a, int set, int row, int token, float v, float up) {
  const Place p = place_of(set, row);
  if (p.tile >= T::TILES || !p.inside()) return;
  v = biased(a, p, v, token);
  if constexpr (T::GATED) v = v / (1.0f + exponential(-v)) * biased(a, place_of(set, row + T::TILE_ROWS), up, token);
  const size_t at = (size_t)token * T::N_OUT + (T::GATED ? p.row : p.column());
  if constexpr (T::RESIDUAL_ADD) v += narrow_float(a.residual, at);
  store(a.out, at, v);
}
