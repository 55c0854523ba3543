// Sums of entries of tables, for 64 rows at once: entries are floats, gathered eight at a time.
#include <immintrin.h>

struct Found {
  __m256 v[8];
};
LB_INLINE Found no_found() { return {}; }

// Adds the entries that 64 indices choose.
template <int SIZE> LB_INLINE void look_up(Found& found, const uint8_t* index, const uint8_t* table) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m256i at = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(index + 8 * i)));
    found.v[i] = _mm256_add_ps(found.v[i], _mm256_i32gather_ps((const float*)table, at, 4));
  }
}
LB_INLINE void add_up(Sums&, Found&) {}
LB_INLINE void put_sums(float* y, const Sums&, const Found& found, float) {
  for (int i = 0; i < 8; ++i) _mm256_storeu_ps(y + 8 * i, _mm256_add_ps(_mm256_loadu_ps(y + 8 * i), found.v[i]));
}
