// Sums of entries of tables, for 64 rows at once: entries are floats, loaded one by one.

struct Found {
  float v[64];
};
LB_INLINE Found no_found() { return {}; }

// Adds the entries that 64 indices choose.
template <int SIZE> LB_INLINE void look_up(Found& found, const uint8_t* index, const uint8_t* table) {
  for (int i = 0; i < 64; ++i) found.v[i] += ((const float*)table)[index[i]];
}
LB_INLINE void add_up(Sums&, Found&) {}
LB_INLINE void put_sums(float* y, const Sums&, const Found& found, float) {
  for (int i = 0; i < 64; ++i) y[i] += found.v[i];
}
