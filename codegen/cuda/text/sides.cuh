// Side values as float32. A lane's eight rows of a tile (16w + 8h + g for all w and h) are neighbours in memory.

LB_DEV float side_float(const unsigned char* p, int i) {
  if constexpr (T::SIDE == 0)
    return half_float(((const uint16_t*)p)[i]);
  else if constexpr (T::SIDE == 1)
    return ((const float*)p)[i];
  else if constexpr (T::SIDE == 2)
    return bits_float(p[i] ? (uint32_t)p[i] << 23 : 0x00400000u);  // e8m0: 2^(byte - 127)
  else
    return half_float((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7) * 256.0f;  // e4m3, exact
}

template <int BYTES> LB_DEV void load_bytes(unsigned char* to, const unsigned char* from) {
  if constexpr (BYTES % 16 == 0) {
#pragma unroll
    for (int i = 0; i < BYTES / 16; ++i) ((uint4*)to)[i] = ((const uint4*)from)[i];
  } else if constexpr (BYTES == 8) {
    *(uint2*)to = *(const uint2*)from;
  } else if constexpr (BYTES == 4) {
    *(uint32_t*)to = *(const uint32_t*)from;
  } else {
    *(uint16_t*)to = *(const uint16_t*)from;
  }
}

// COUNT values from the one of row 16w + g on: those of h = 0, 1, then of the next w.
template <int COUNT> LB_DEV void sides_of(float* out, const unsigned char* values, int g, int w) {
  alignas(16) unsigned char held[COUNT * T::SIDE_BYTES];
  load_bytes<COUNT * T::SIDE_BYTES>(held, values + (g * 8 + w * 2) * T::SIDE_BYTES);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) out[i] = side_float(held, i);
}

// The same of zero points, each 2**23 more: so a byte becomes a float in one instruction.
template <int COUNT> LB_DEV void zeros_of(float* out, const unsigned char* values, int g, int w) {
  alignas(16) unsigned char held[COUNT < 4 ? 4 : COUNT];
  load_bytes<COUNT>(held, values + g * 8 + w * 2);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) out[i] = raised_byte(((const uint32_t*)held)[i / 4], i % 4);
}
