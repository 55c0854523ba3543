// From float32 sums to the stored output: scales of whole rows, bias, silu-mul, residual.

constexpr int ROWS = T::ROW_TILES * 64;

struct Place {
  int tile, segment, row;  // row of its segment

  LB_DEV bool inside() const { return row < T::segment_rows(segment); }
  LB_DEV int column() const { return T::segment_start(segment) + row; }
};

LB_DEV Place place_of(int set, int row) {
  const int tile = T::GATED ? set + row / 64 * T::TILE_SETS : set * T::ROW_TILES + row / 64;
  int segment = 0;
#pragma unroll
  for (int i = 1; i < T::SEGMENTS; ++i) segment += tile >= T::segment_tile(i);
  return {tile, segment, (tile - T::segment_tile(segment)) * 64 + row % 64};
}

LB_DEV float whole_rows(const Args& a, const Place& p, float v) {
  v *= T::FACTOR;
  if constexpr (!T::IN_LOOP) {
    const int in = p.row % 64;
    v *= side_float(a.scale, p.tile * 64 + in % 8 * 8 + in / 8);
  }
  if constexpr (T::TENSOR_SCALE) v *= a.tensor_scale[p.segment];
  if constexpr (T::BIAS) v += a.bias[p.column()];
  return v;
}

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

// The sums of one token and row; of the row's gate and up where they are multiplied.
LB_DEV void finish(const Args& a, int set, int row, int token, float v, float up) {
  const Place p = place_of(set, row);
  if (p.tile >= T::TILES || !p.inside()) return;
  v = whole_rows(a, p, v);
  if constexpr (T::GATED) v = v / (1.0f + exponential(-v)) * whole_rows(a, place_of(set, row + 64), up);
  const size_t at = (size_t)token * T::N_OUT + (T::GATED ? p.row : p.column());
  if constexpr (T::RESIDUAL) v += narrow_float(a.residual, at);
  store(a.out, at, v);
}
