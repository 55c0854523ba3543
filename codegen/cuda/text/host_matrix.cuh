// Matrix instructions, played on a CPU for all lanes at once. A row or column of 32 bytes holds 16, 32 or 64 numbers.
namespace host {

constexpr int DEPTH = 256 / T::BITS, PER_WORD = 32 / T::BITS;

inline double from_e4m3(uint8_t b) {
  const int exponent = b >> 3 & 15, fraction = b & 7;
  if (exponent == 15 && fraction == 7) return NAN;
  const double v = ldexp(exponent ? fraction + 8 : fraction, (exponent ? exponent : 1) - 10);
  return b & 0x80 ? -v : v;
}

// The i-th number of a word. Nibbles are signed on the left and unsigned on the right.
inline double number(uint32_t word, int i, bool left) {
  if (T::BITS == 16) return from16(word >> 16 * i);
  if (T::BITS == 4) return (int)((word >> 4 * i & 15) ^ (left ? 8 : 0)) - (left ? 8 : 0);
  const uint8_t byte = word >> 8 * i;
  return T::INTEGER ? (double)(int8_t)byte : from_e4m3(byte);
}

template <class S> struct MmaIn { S c[4]; const uint32_t *a, *b; };

// Column k of a row of activations, as a descriptor with 128-byte swizzle says: bits 4 to 6 of the address are changed by
// bits 7 to 9.
inline double matrix_unit_reads(uint64_t descriptor, int row, int k) {
  const uint32_t at = (uint32_t)(descriptor & 0x3fff) * 16 + row / 8 * 1024 + row % 8 * 128 + k * T::BITS / 8;
  uint32_t value = 0;
  memcpy(&value, shared_base + (at ^ (at >> 3 & 0x70)), T::BITS / 8);
  return number(value, 0, false);
}

template <class S> struct WgmmaIn { S (*sums)[4]; const uint32_t* a; uint64_t x; bool add; };

}  // namespace host

template <class S> LB_DEV void mma(S (&c)[4], const uint32_t (&a)[4], const uint32_t* b) {
  using In = host::MmaIn<S>;
  In in = {{c[0], c[1], c[2], c[3]}, a, b};
  host::agree(&in, c, [](host::Warp& w) {
    constexpr int D = host::DEPTH, PER = host::PER_WORD;
    double left[16][D], right[D][8];
    for (int lane = 0; lane < 32; ++lane) {
      const In* m = (const In*)w.in[lane];
      const int g = lane / 4, t = lane % 4;
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < PER; ++e) {
          left[g + r % 2 * 8][t * PER + e + r / 2 * D / 2] = host::number(m->a[r], e, true);
          if (r < 2) right[t * PER + e + r * D / 2][g] = host::number(m->b[r], e, false);
        }
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        double sum = ((const In*)w.in[lane])->c[i];
        for (int k = 0; k < D; ++k) sum += left[lane / 4 + i / 2 * 8][k] * right[k][lane % 4 * 2 + i % 2];
        ((S*)w.out[lane])[i] = (S)sum;
      }
  });
}

// `in` of 128 threads; the last one computes for all.
template <class S, int N> LB_DEV void wgmma(S (&sums)[N][4], const uint32_t (&a)[4], uint64_t x, bool add) {
  static_assert(N <= 32, "tokens of a warpgroup's product");
  using In = host::WgmmaIn<S>;
  In in = {sums, a, x, add};
  const int thread = host::current->thread.x;
  host::Warpgroup& w = host::warpgroups[thread / 128];
  w.in[thread % 128] = &in;
  const long round = w.round;
  if (++w.arrived == 128) {
    constexpr int D = host::DEPTH, PER = host::PER_WORD;
    if ((x >> 62) != 1 || (x >> 32 & 0x3fff) != 64) host::fail("activations are not described as they lie");
    static double right[256][D], left[64][D];
    for (int token = 0; token < N * 8; ++token)
      for (int k = 0; k < D; ++k) right[token][k] = host::matrix_unit_reads(x, token, k);
    for (int t = 0; t < 128; ++t) {
      const In& m = *(const In*)w.in[t];
      if (m.x != x || m.add != add) host::fail("warps disagree about a product");
      for (int r = 0; r < 4; ++r)
        for (int e = 0; e < PER; ++e)
          left[t / 32 * 16 + t / 4 % 8 + r % 2 * 8][t % 4 * PER + e + r / 2 * D / 2] = host::number(m.a[r], e, true);
    }
    for (int t = 0; t < 128; ++t) {
      const In& m = *(const In*)w.in[t];
      for (int i = 0; i < N * 4; ++i) {
        const int column = i / 4 * 8 + t % 4 * 2 + i % 2, row = t / 32 * 16 + t / 4 % 8 + i / 2 % 2 * 8;
        double sum = add ? m.sums[i / 4][i % 4] : 0;
        for (int k = 0; k < D; ++k) sum += left[row][k] * right[column][k];
        w.result[t][i] = sum;
      }
    }
    for (int t = 0; t < 128; ++t)
      for (int i = 0; i < N * 4; ++i) ((const In*)w.in[t])->sums[i / 4][i % 4] = (S)w.result[t][i];
    w.arrived = 0, ++w.round;
  }
  while (w.round == round) host::yield();
}
