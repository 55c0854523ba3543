// Sums of entries of tables, for 64 rows at once: entries are floats, as they were computed, loaded one by one.

constexpr int kEntryBytes = 4;

// Nothing is scaled, so nobody asks for the largest.
struct Most {};
LB_INLINE Most no_most() { return {}; }
LB_INLINE void take(Most&, F) {}
LB_INLINE uint32_t bits_of(const Most&) { return 0; }

// Nothing is widened: what is found is the sum.
struct Sums {};
LB_INLINE Sums no_sums() { return {}; }
LB_INLINE float scale_for(uint32_t, float&) { return 1.0f; }
template <int SIZE> LB_INLINE void put_entries(const float* from, float, uint8_t* to) { memcpy(to, from, SIZE * 4); }
LB_INLINE void in_order(const float* y, float* rows) { memcpy(rows, y, 64 * sizeof(float)); }

struct Found {
  float v[64];
};
LB_INLINE Found no_found() { return {}; }

template <int SIZE> LB_INLINE const uint8_t* table_at(const uint8_t* from) { return from; }

// Adds the entries that 64 indices choose.
template <int SIZE> LB_INLINE void look_up(Found& found, const uint8_t* index, const uint8_t* table) {
  for (int i = 0; i < 64; ++i) found.v[i] += ((const float*)table)[index[i]];
}
LB_INLINE void add_up(Sums&, Found&) {}
LB_INLINE void put_sums(float* y, const Sums&, const Found& found, float) {
  for (int i = 0; i < 64; ++i) y[i] += found.v[i];
}
