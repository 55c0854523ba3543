// As in `trellis_avx2.h`, one half of the lanes after the other.
template <uint32_t A, int DROP> LB_INLINE V byte_sum(V s) {
  uint32_t lanes[16];
  vstore(lanes, s);
  for (int i = 0; i < 16; ++i) {
    const uint32_t hashed = lanes[i] * A, pairs = (hashed & 0x00ff00ff) + ((hashed >> 8) & 0x00ff00ff);
    lanes[i] = ((pairs & 0xffff) + (pairs >> 16)) >> DROP;
  }
  return vload(lanes);
}
template <uint32_t A, int DROP> LB_INLINE V byte_sums(V s) {
  return vor(byte_sum<A, DROP>(vand(s, set1(0xffff))), shl<16>(byte_sum<A, DROP>(shr<16>(s))));
}
