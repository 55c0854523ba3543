// 64 bytes from places of their own, ROW at each, and bytes or words of two vectors in turns, within 16-byte lanes.
template <int ROW> LB_INLINE V rows_at(const uint8_t* book, const uint64_t* at) {
  uint8_t room[64];
  for (int i = 0; i < 64 / ROW; ++i) memcpy(room + i * ROW, book + at[i], ROW);
  return vload(room);
}
// Sums of bytes, modulo 256.
LB_INLINE V add_levels(V x, V y) {
  uint8_t a[64], b[64];
  vstore(a, x), vstore(b, y);
  for (int i = 0; i < 64; ++i) a[i] = uint8_t(a[i] + b[i]);
  return vload(a);
}
template <int HIGH, typename T> LB_INLINE V zip(V a, V b) {
  constexpr int half = 8 / sizeof(T);
  T x[64 / sizeof(T)], y[64 / sizeof(T)], z[64 / sizeof(T)];
  vstore(x, a), vstore(y, b);
  for (int lane = 0; lane < 4; ++lane)
    for (int i = 0; i < half; ++i) {
      z[2 * (lane * half + i)] = x[(2 * lane + HIGH) * half + i];
      z[2 * (lane * half + i) + 1] = y[(2 * lane + HIGH) * half + i];
    }
  return vload(z);
}
template <int HIGH> LB_INLINE V zip_bytes(V a, V b) { return zip<HIGH, uint8_t>(a, b); }
template <int HIGH> LB_INLINE V zip_words(V a, V b) { return zip<HIGH, uint16_t>(a, b); }
