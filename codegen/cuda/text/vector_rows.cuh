// Rows of vector formats: a tile is eight rows of vectors, each padded to 8 or 16 rows unless it divides 8.

constexpr int ROWS = T::ROW_TILES * T::TILE_ROWS;

struct Place {
  int tile, segment, row;  // row of its segment

  LB_DEV bool inside() const { return row < T::segment_rows(segment); }
  LB_DEV int column() const { return T::segment_start(segment) + row; }
};

LB_DEV int segment_of(int tile) {
  int segment = 0;
#pragma unroll
  for (int i = 1; i < T::SEGMENTS; ++i) segment += tile >= T::segment_tile(i);
  return segment;
}

LB_DEV int tile_of(int set, int r) { return set + r * T::TILE_SETS; }

LB_DEV Place place_of(int set, int row) {
  const int tile = tile_of(set, row / T::TILE_ROWS), segment = segment_of(tile), in = row % T::TILE_ROWS;
  const int lane = in % T::VECTOR_ROWS, vector = (tile - T::segment_tile(segment)) * 8 + in / T::VECTOR_ROWS;
  return {tile, segment, lane < T::DIM ? vector * T::DIM + lane : T::segment_rows(segment)};
}

// Norms: value * scale + bias, by row, or by column, which `prepare` has seen to but for the sum over biases.
LB_DEV float whole_rows(const Args& a, const Place& p, float v, int token) {
  v *= a.x_scale[token];
  if constexpr (T::ROW_NORM)
    return fma32(v, a.norm_scale[p.column()], a.norm_bias[p.column()] * a.x_scale[a.tokens + token]);
  return T::COLUMN_NORM ? v + a.x_scale[a.tokens + token] : v;
}
