// The nearest level of a scaled activation.
LB_DEV float level(float v, float least, float top) {
  if (!(fabsf(v) < bits_float(0x7f800000))) v = 0.0f;
  v = fminf(fmaxf(v, least), top);
  if constexpr (T::X_MANTISSA < 0) return rintf(v);
  // A float: adding and taking away 1.5 * 2**23 spacings rounds.
  uint32_t power = float_bits(v) & 0x7f800000;
  power = power < T::X_LEAST ? T::X_LEAST : power;
  const float magic = bits_float(power - ((uint32_t)(T::X_MANTISSA & 31) << 23)) * 12582912.0f;
  return (v + magic) - magic;
}

LB_DEV uint32_t operand_of(float v) {
  if constexpr (T::BITS == 16) return T::BF16 ? float_bfloat(v) : float_half(v);
  if constexpr (T::INTEGER) return (uint32_t)(int)v & ((1 << T::BITS) - 1);
  const uint32_t bits = float_bits(v), sign = bits >> 24 & 0x80;
  const float size = fabsf(v);  // e4m3
  return sign | (size < 0.015625f ? (uint32_t)(size * 512.0f) : (bits >> 20 & 0x7ff) - (120 << 3));
}
