// One unit: decode a warp's weights into operands, multiply, scale the sums of every group.
//
// A weight is (d * FACTOR + addend(h) - zero) * scale + offset, where d is what the register holds. FACTOR waits until
// the end. The rest meets sums: that of d * x, and, for what is added to d, that of x, which comes from a matrix
// instruction too. Where many tokens share a weight (EXACT), addend and zero are added to d instead. Sums of bytes are
// integers until then, and so exact; where activations have scales by group, those meet the sums as well. Activations of
// nibbles are levels less the least of their group: that times the sum of the weights, which a matrix instruction with
// ones adds up, is what the sums lack.
//
// Every `if constexpr` over a loop has braces: without them nvcc 13 drops the next loop when a condition is false.

template <bool INTEGER> struct Number { using type = float; };
template <> struct Number<true> { using type = int; };
template <bool FIRST> struct Pick {
  template <class A, class B> static LB_DEV B& of(A&, B& b) { return b; }
};
template <> struct Pick<true> {
  template <class A, class B> static LB_DEV A& of(A& a, B&) { return a; }
};

constexpr int TT = T::TOKEN_TILES;
constexpr int STEPS = T::BITS / 4;                      // matrix instructions along a block
constexpr int PARTS = T::ROW_TILES * 4 / T::ROW_WARPS;  // of 16 rows, that a warp multiplies
constexpr int PAIR = T::TILE_M == 1 ? 1 : 2;            // a lane's tokens of a tile: of a single one none is odd
constexpr bool SUMS_W = T::BITS == 4;                   // whether sums of weights are needed
constexpr int RUN = PARTS < 4 ? PARTS : 4;              // of them in one tile
using Raw = Number<T::INTEGER>::type;                   // what matrix instructions add up
using Sums = Raw[PARTS][TT][4];
using WeightSums = Raw[SUMS_W ? PARTS : 1][4];
using Totals = Number<T::INTEGER && T::DIRECT>::type[PARTS][TT][4];

template <int WORDS> LB_DEV void load_words(uint32_t (&w)[WORDS], const unsigned char* from) {
  if constexpr (WORDS >= 4) {
#pragma unroll
    for (int i = 0; i < WORDS / 4; ++i) {
      const uint4 v = ((const uint4*)from)[i];
      w[4 * i] = v.x, w[4 * i + 1] = v.y, w[4 * i + 2] = v.z, w[4 * i + 3] = v.w;
    }
  } else if constexpr (WORDS == 2) {
    const uint2 v = *(const uint2*)from;
    w[0] = v.x, w[1] = v.y;
  } else {
    w[0] = *(const uint32_t*)from;
  }
}

// A lane's words of 16 rows x 64 columns.
struct Words {
  uint32_t w0[T::plane_bits(0)], w1[T::plane_bits(1)], w2[T::plane_bits(2)];

  // part: of all the stage's parts of 16 rows.
  LB_DEV void load(const unsigned char* stage, int part, int b, int lane) {
    const int at = ((part / 4 * T::UNIT_BLOCKS + b) * 4 + part % 4) * 32 + lane;
    load_words(w0, stage + plane_at(0) + at * T::plane_bits(0) * 4);
    if constexpr (T::PLANES > 1) load_words(w1, stage + plane_at(1) + at * T::plane_bits(1) * 4);
    if constexpr (T::PLANES > 2) load_words(w2, stage + plane_at(2) + at * T::plane_bits(2) * 4);
  }
};

// What a warp needs of the side values of one group: two values (h = 0, 1) for each of its parts.
struct Sides {
  float scale[2 * PARTS], zero[T::ZERO ? 2 * PARTS : 1], offset[T::OFFSET ? 2 * PARTS : 1];

  LB_DEV void load(const unsigned char* stage, int first_part, int j, int lane) {
#pragma unroll
    for (int i = 0; i < PARTS; i += RUN) {
      const int tile = (first_part + i) / 4, w = (first_part + i) % 4, at = (tile * T::FLUSHES + j) * 64;
      sides_of<2 * RUN>(scale + 2 * i, stage + SCALE_AT + at * T::SIDE_BYTES, lane / 4, w);
      if constexpr (T::ZERO) zeros_of<2 * RUN>(zero + 2 * i, stage + ZERO_AT + at, lane / 4, w);
      if constexpr (T::OFFSET) sides_of<2 * RUN>(offset + 2 * i, stage + OFFSET_AT + at * T::SIDE_BYTES, lane / 4, w);
    }
  }

  // What is added to d. Zero points are 2**23 too large, which the addend makes up for where a float holds both.
  LB_DEV float addend(int part, int h) const {
    constexpr float MORE = 8388608.0f * T::UNFACTOR, ADDEND[2] = {T::addend(0) + MORE, T::addend(1) + MORE};
    constexpr bool HELD = ADDEND[0] - MORE == T::addend(0) && ADDEND[1] - MORE == T::addend(1);
    if constexpr (!T::ZERO) return T::addend(h);
    if constexpr (HELD) return (T::addend(h) + MORE) - zero[2 * part + h] * T::UNFACTOR;
    return T::addend(h) - (zero[2 * part + h] - 8388608.0f) * T::UNFACTOR;
  }
  LB_DEV int zero_of(int part, int h) const { return (int)(float_bits(zero[2 * part + h]) & 255); }
};

// Scale the sums of a group and add them to those of the rows; x_sum holds the activations' sums, w_sum the weights',
// x_scale the scales of the stage's tokens, and their least levels. CLEAR: leave zeros in all sums.
template <bool CLEAR>
LB_DEV void flush(Totals& y, Sums& sum, Raw (&x_sum)[TT][4], WeightSums& w_sum, const Sides& sides, const float* x_scale,
                  int lane) {
  float of_token[TT][2], least[TT][2];
  if constexpr (T::GROUP_X) {
#pragma unroll
    for (int t = 0; t < TT; ++t)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int token = t * 8 + lane % 4 * 2 + i;
        const bool there = T::TILE_M >= 8 || token < T::SCALE_TOKENS;
        of_token[t][i] = there ? x_scale[token] : 0.0f;
        if constexpr (SUMS_W) least[t][i] = there ? x_scale[T::SCALE_TOKENS + token] : 0.0f;
      }
  }
#pragma unroll
  for (int m = 0; m < PARTS; ++m)
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int t = 0; t < TT; ++t)
#pragma unroll
        for (int i = 0; i < PAIR; ++i) {
          float v = (float)sum[m][t][2 * h + i], all = T::SUMS_X ? (float)x_sum[t][i] : 0.0f;
          if constexpr (T::SUMS_X && !T::EXACT) v = fma32(sides.addend(m, h), all, v);
          if constexpr (SUMS_W) v = fma32(least[t][i], (float)w_sum[m][2 * h], v);
          if constexpr (T::GROUP_X) v *= of_token[t][i], all *= of_token[t][i];
          float out = y[m][t][2 * h + i];
          out = T::IN_LOOP ? fma32(sides.scale[2 * m + h], v, out) : out + v;
          if constexpr (T::OFFSET) out = fma32(sides.offset[2 * m + h] * T::UNFACTOR, all, out);
          y[m][t][2 * h + i] = out;
        }
  if constexpr (CLEAR) {  // all of them: matrix instructions take zeros from no register
#pragma unroll
    for (int i = 0; i < PARTS * TT * 4; ++i) sum[i / 4 / TT][i / 4 % TT][i % 4] = 0;
  }
  if constexpr (SUMS_W && CLEAR) {
#pragma unroll
    for (int i = 0; i < PARTS * 4; ++i) w_sum[i / 4][i % 4] = 0;
  }
  if constexpr (T::SUMS_X && CLEAR) {
#pragma unroll
    for (int t = 0; t < TT; ++t) x_sum[t][0] = x_sum[t][1] = x_sum[t][2] = x_sum[t][3] = 0;
  }
}

LB_DEV const float* x_scales(const unsigned char* stage, int j) {
  return (const float*)(stage + X_SCALE_AT) + j * T::SCALE_TOKENS * T::X_SIDES;
}

// Zero points and addends meet operands: halves, or four unsigned bytes that become signed ones without carrying into
// each other ("LiquidGEMM: Hardware-Efficient W4A8 GEMM Kernel for High-Performance LLM Serving").
LB_DEV uint32_t shifted(uint32_t a, const Sides& sides, int part, int h) {
  if constexpr (T::BITS == 8) {
    if constexpr (!T::ZERO) return a;
    return (a + (128 - sides.zero_of(part, h)) * 0x01010101u) ^ 0x80808080u;
  } else {
    if constexpr (!T::ZERO && T::addend(0) == 0.0f && T::addend(1) == 0.0f) return a;
    return fma16(a, T::ONES, pair16(sides.addend(part, h)));
  }
}

#if LB_ROWS_IN
// Four bytes, of which the first and third are neighbouring columns, the others too, as two pairs of float16. Integers go
// on top of 1024 first; of e4m3 the exponent's smaller bias is a factor.
LB_DEV void widen(uint32_t* pairs, uint32_t bytes) {
  const uint32_t word = T::X_MANTISSA < 0 ? bytes ^ 0x80808080u : bytes;
  if constexpr (T::X_MANTISSA < 0) {
    const uint32_t down = 0xe480e480u;  // -1152
    pairs[0] = fma16(prmt<0x4240>(word, 0x64646464u), T::ONES, down);
    pairs[1] = fma16(prmt<0x4341>(word, 0x64646464u), T::ONES, down);
  } else {
    const uint32_t first = prmt<0x2404>(word, 0), second = band(word, 0xff00ff00u);
    pairs[0] = fma16(band_or(first >> 1, 0x3f803f80u, band(first, 0x80008000u)), 0x5c005c00u, 0);  // 256
    pairs[1] = fma16(band_or(second >> 1, 0x3f803f80u, band(second, 0x80008000u)), 0x5c005c00u, 0);
  }
}

#endif
// The activations of 64 bytes of columns as right operands of two steps.
LB_DEV void load_x(uint32_t (&x)[TT][4], const unsigned char* stage, const unsigned char* zeros, int pair, int lane) {
#pragma unroll
  for (int t = 0; t < TT; ++t) {
    const int row = t * 8 + lane % 8;
#if LB_ROWS_IN
    const int chunk = T::BITS == 16 ? pair / 2 : pair;
    const unsigned char* at = stage + X_AT + row * X_STRIDE + swizzle(row, chunk * 4 + lane / 8) * 16;
    if constexpr (T::BITS == 16) {
      uint32_t bytes[4];
      ldmatrix(bytes, T::TILE_M < 8 && row >= T::TILE_M ? zeros : at);
      widen(x[t], bytes[pair % 2 * 2]);
      widen(x[t] + 2, bytes[pair % 2 * 2 + 1]);
    } else {
      ldmatrix(x[t], T::TILE_M < 8 && row >= T::TILE_M ? zeros : at);
    }
#else
    const unsigned char* at = stage + X_AT + row * X_STRIDE + swizzle(row, pair * 4 + lane / 8) * 16;
    ldmatrix(x[t], T::TILE_M < 8 && row >= T::TILE_M ? zeros : at);
#endif
  }
}

LB_DEV void multiply_unit(Totals& y, const unsigned char* stage, const unsigned char* zeros, const uint16_t* table,
                          int first_part, int lane) {
  const uint32_t ones[4] = {T::ONES, T::ONES, T::ONES, T::ONES};
  Sums sum = {};
  Raw x_sum[TT][4] = {};
  WeightSums w_sum = {};
  uint32_t x[TT][4];
  Sides sides;
#pragma unroll
  for (int b = 0; b < T::UNIT_BLOCKS; ++b) {
    Words words[PARTS];
#pragma unroll
    for (int m = 0; m < PARTS; ++m) words[m].load(stage, first_part + m, b, lane);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      constexpr int PER = T::FLUSH * T::BITS / 256;
      const int s = b * STEPS + step;
      if (T::EXACT && T::IN_LOOP && s % PER == 0) sides.load(stage, first_part, s / PER, lane);
      if (s % 2 == 0) load_x(x, stage, zeros, s / 2, lane);
#pragma unroll
      for (int m = 0; m < PARTS; ++m) {
        uint32_t all[STEPS][4];
        decode(all, words[m].w0, words[m].w1, words[m].w2, table);
        if constexpr (T::EXACT) {
#pragma unroll
          for (int i = 0; i < 4; ++i) all[step][i] = shifted(all[step][i], sides, m, i % 2);
        }
#pragma unroll
        for (int t = 0; t < TT; ++t) mma(Pick<T::DIRECT>::of(y[m][t], sum[m][t]), all[step], x[t] + s % 2 * 2);
        if constexpr (SUMS_W) mma(w_sum[m], all[step], ones);
      }
      if constexpr (T::SUMS_X) {
#pragma unroll
        for (int t = 0; t < TT; ++t) mma(x_sum[t], ones, x[t] + s % 2 * 2);
      }
      if (!T::DIRECT && s % PER == PER - 1) {
        if (T::IN_LOOP && !T::EXACT) sides.load(stage, first_part, s / PER, lane);
        flush<true>(y, sum, x_sum, w_sum, sides, x_scales(stage, s / PER), lane);
      }
    }
  }
}
