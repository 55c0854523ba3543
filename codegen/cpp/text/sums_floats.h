// Tables of sums whose entries are floats, as they were computed: what the headers that load them share.

constexpr bool kWords = false;
constexpr int kEntryBytes = 4;

// Nothing is widened: what is found is the sum.
struct Sums {};
LB_INLINE Sums no_sums() { return {}; }
LB_INLINE float scale_for(uint32_t, float&) { return 1.0f; }
template <int SIZE> LB_INLINE void put_entries(const float* from, float, uint8_t* to) { memcpy(to, from, SIZE * 4); }
LB_INLINE void in_order(const float* y, float* rows) { memcpy(rows, y, 64 * sizeof(float)); }
