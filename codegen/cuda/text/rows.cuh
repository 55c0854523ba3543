// Which row of the output a row of a tile is, and what its sums are multiplied with.

constexpr int ROWS = T::ROW_TILES * T::TILE_ROWS;

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

LB_DEV float whole_rows(const Args& a, const Place& p, float v, int token) {
  v *= T::FACTOR;
#if LB_ROWS_IN
  if constexpr (T::TOKEN_X) v *= *row_scale(a, token, 0);
#else
  if constexpr (T::TOKEN_X) v *= a.x_scale[token];
#endif
  if constexpr (!T::IN_LOOP) {
    const int in = p.row % 64;
    v *= side_float(a.scale, p.tile * 64 + in % 8 * 8 + in / 8);
  }
  if constexpr (T::TENSOR_SCALE) v *= a.tensor_scale[p.segment];
  return v;
}
