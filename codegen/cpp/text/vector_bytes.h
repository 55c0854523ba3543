// Centroids of bytes as operands of byte dot products: 64 / ROW of them, of each of four columns, become the four bytes
// of 64 rows. Row 16 * L + 4 * i + r (ROW rows a centroid, of which the last may be padding) is 32-bit lane 4 * L + r of
// vector i.
struct Quads {
  V w[4];
};
LB_INLINE Quads quads(V a, V b, V c, V d) {
  const V ab0 = zip_bytes<0>(a, b), ab1 = zip_bytes<1>(a, b), cd0 = zip_bytes<0>(c, d), cd1 = zip_bytes<1>(c, d);
  return {{zip_words<0>(ab0, cd0), zip_words<1>(ab0, cd0), zip_words<0>(ab1, cd1), zip_words<1>(ab1, cd1)}};
}

// N neighbouring indices as places in a codebook. Two 16-bit ones are one load: loads are what is short.
template <int N, int ROW> LB_INLINE void places(const uint16_t* index, uint64_t* at) {
#pragma GCC unroll 8
  for (int i = 0; i < N; i += 2) {
    uint32_t two;
    memcpy(&two, index + i, 4);
    at[i] = uint64_t(uint16_t(two)) * ROW, at[i + 1] = uint64_t(two >> 16) * ROW;
  }
}
template <int N, int ROW> LB_INLINE void places(const uint8_t* index, uint64_t* at) {
#pragma GCC unroll 8
  for (int i = 0; i < N; i += 2) {
    uint16_t two;
    memcpy(&two, index + i, 2);
    at[i] = uint64_t(uint8_t(two)) * ROW, at[i + 1] = uint64_t(two >> 8) * ROW;
  }
}

// The centroids of 64 / ROW vectors of one column: 8 or fewer at `index`, the others at `next`.
template <int ROW, typename I> LB_INLINE V centroids(const uint8_t* book, const I* index, [[maybe_unused]] const I* next) {
  uint64_t at[64 / ROW];
  places<ROW == 16 ? 4 : 8, ROW>(index, at);
  if constexpr (ROW == 4) places<8, ROW>(next, at + 8);
  return rows_at<ROW>(book, at);
}

// Adds what four vectors of lanes at `sums` stand for to the rows of vectors of DIM at `y`.
template <int ROW, int DIM> LB_INLINE void add_rows(const float* sums, float* y) {
  for (int v = 0; v < 64 / ROW; ++v)
    for (int e = 0; e < DIM; ++e) {
      const int row = v * ROW + e;
      y[v * DIM + e] += sums[row / 4 % 4 * 16 + row / 16 * 4 + row % 4];
    }
}
