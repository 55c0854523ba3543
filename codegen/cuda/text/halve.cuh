// bfloat16 activations as float16: a power of two per token puts the largest below 2**15, so that numbers keep all their
// bits down to 2**-31 of it.

struct Halving {
  float unit, back;  // to float16; what sums are multiplied with

  // most: bits of the largest magnitude. Zeros, and what is no number, stay as they are.
  LB_DEV explicit Halving(uint32_t most) {
    const int exponent = (int)(most >> 23), by = exponent == 0 || exponent == 255 ? 0 : exponent - (127 + 14);
    const int down = by > 126 ? 126 : by < -126 ? -126 : by;
    unit = bits_float((uint32_t)(127 - down) << 23), back = bits_float((uint32_t)(127 + down) << 23);
  }
};
