// Codebooks as tables, which permutes of registers read. A step is four columns of 16 vectors, and makes an operand of
// a byte dot product of every coordinate: 32-bit lane v has four columns of vector v.

// The sorted indices of `left` columns, fewer than four; those that are missing are 0.
LB_INLINE V by_vector(const uint8_t* p, const uint8_t* q, int64_t left) {
  uint8_t room[64] = {};
  memcpy(room, p, size_t(left) * 8), memcpy(room + 32, q, size_t(left) * 8);
  return by_vector(room, room + 32);
}
// All bits of those columns.
LB_INLINE V columns_of(int64_t left) { return set1((1u << (8 * left)) - 1); }

// Bytes of a table of one coordinate of SIZE centroids. Two coordinates lie one behind the other, or as words.
template <int SIZE> constexpr int kTable = (SIZE + 63) / 64 * 64;

// Coordinate `e` of SIZE centroids, a byte of every ROW at `from`, as a table. Words are in pieces of 64: number 0 as
// it is, number 1 plus 0, number 2 plus 0, number 3 plus 0, 1 and 2, all without carry, so that the pieces that bits of
// an index ask for add up to the centroid's byte (`words_of`). The last pair of an odd number is half empty.
template <int SIZE, int ROW> LB_INLINE void put_table(uint8_t* book, int64_t e, const uint8_t* from) {
  if constexpr (SIZE <= kByteEntries) {
    for (int j = 0; j < SIZE; ++j) book[e * kTable<SIZE> + j] = from[j * ROW];
  } else {
    constexpr int pieces = SIZE / 64;
    static_assert(pieces == 2 || pieces == 4, "one or two bits of an index choose among pieces");
    uint8_t* to = book + e / 2 * 2 * kTable<SIZE> + e % 2;
    for (int j = 0; j < 64; ++j) {
      uint8_t x[pieces];
      for (int i = 0; i < pieces; ++i) x[i] = from[(64 * i + j) * ROW];
      for (int i = 1; i < pieces; i += 2) x[i] ^= x[i - 1];
      for (int i = 2; i < pieces; ++i) x[i] ^= x[i - 2];
      for (int i = 0; i < pieces; ++i) to[128 * i + 2 * j] = x[i];
    }
  }
}

// The operand of the first or second of two coordinates, whose tables of bytes are at book + AT.
template <int SIZE, int AT, int SECOND> LB_INLINE V operand_of(V index, const uint8_t* book) {
  return entry_of<SIZE, AT + SECOND * kTable<SIZE>>(index, book);
}

// Adds sums of 16 vectors of DIM, coordinate after coordinate, to their rows at `y`.
template <int DIM> LB_INLINE void add_coordinates(const float* sums, float* y) {
  for (int v = 0; v < 16; ++v)
    for (int e = 0; e < DIM; ++e) y[v * DIM + e] += sums[e * 16 + v];
}
