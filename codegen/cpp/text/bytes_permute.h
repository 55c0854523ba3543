// Codebooks as tables, one of each coordinate, which permutes of registers read. A step is four columns of 16 vectors,
// and makes an operand of a byte dot product of every coordinate: 32-bit lane v has four columns of vector v.

// The sorted indices of `left` columns, fewer than four; those that are missing are 0.
LB_INLINE V by_vector(const uint8_t* p, const uint8_t* q, int64_t left) {
  uint8_t room[64] = {};
  memcpy(room, p, size_t(left) * 8), memcpy(room + 32, q, size_t(left) * 8);
  return by_vector(room, room + 32);
}
// All bits of those columns.
LB_INLINE V columns_of(int64_t left) { return set1((1u << (8 * left)) - 1); }

// Adds sums of 16 vectors of DIM, coordinate after coordinate, to their rows at `y`.
template <int DIM> LB_INLINE void add_coordinates(const float* sums, float* y) {
  for (int v = 0; v < 16; ++v)
    for (int e = 0; e < DIM; ++e) y[v * DIM + e] += sums[e * 16 + v];
}
