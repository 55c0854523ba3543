// Activations of one token for scalar formats: gathered into the packed column order, then rounded chunk by chunk.

// What activations of a group are divided by, and its reciprocal, both 0 for a group that counts as zero; its least and
// largest level.
struct Step {
  float step, inverse, least, top;
};

// The step by which the range that ends at `largest` has `top` levels beside zero. A range below 1e-30 counts as zero
// (its reciprocal would overflow); one that is not finite gets the step NaN, and so does its output.
[[maybe_unused]] LB_INLINE Step step_for(float largest, float top) {
  if (!(largest - largest == 0.0f)) return {lb_float(0x7fc00000), 0.0f, 0.0f, 0.0f};
  const float step = largest / top;
  return largest > 1e-30f ? Step{step, 1.0f / step, -top - kBelow, top} : Step{0.0f, 0.0f, 0.0f, 0.0f};
}

// The step of group g from its `n` values: the largest magnitude, times kClip, becomes the largest level; or, where
// levels cover the range, its ends, times kClip, become the first and the last.
[[maybe_unused]] LB_INLINE Step find_step(const float* x, int64_t n, int64_t g) {
#if LB_ASYM
  if (g >= kWideGroups) {
    const Range range = range_of(x, n);
    Step s = step_for((range.high - range.low) * kClip, top_of(g));
    s.least = whole_number(range.low * s.inverse * kClip);
    s.top = s.least + top_of(g);
    return s;
  }
#endif
  return step_for(lb_float(largest_bits(x, n)) * kClip, top_of(g));
}

// The step of group g of activations, whose `n` values are at `x`.
[[maybe_unused]] LB_INLINE Step step_of(const Args& a, int64_t g, const float* x, int64_t n) {
#if LB_STATIC
  const float step = a.input_scale[g], top = top_of(g);
  return {step, step > 0.0f ? 1.0f / step : 0.0f, -top - kBelow, top};
#else
  return find_step(x, n, g);
#endif
}

// x in steps, before rounding. What is not finite becomes 0.
[[maybe_unused]] LB_INLINE float in_steps(float x, const Step& s) {
  float v = x * s.inverse;
  v = v - v == 0.0f ? v : 0.0f;
#if LB_SATURATE
  v = v < s.least ? s.least : v > s.top ? s.top : v;
#endif
  return v;
}

#if LB_ROUND
// The nearest level, ties to even: integers (LB_ROUND 1), or floats (2) of kMantissa bits, whose spacing is that of the
// power of two below the magnitude and no smaller than that of kLeastBits. Adding and taking away 1.5 * 2**23 spacings
// rounds.
LB_INLINE float nearest_level(float v) {
#if LB_ROUND == 1
  return whole_number(v);
#else
  const uint32_t power = lb_bits(v) & 0x7f800000;
  const uint32_t spacing = (power > kLeastBits ? power : kLeastBits) - (uint32_t(kMantissa) << 23);
  const float magic = lb_float(spacing) * 12582912.0f;
  return (v + magic) - magic;
#endif
}

// Activations of the whole row in stored order, rounded to their format and back.
LB_INLINE void round_floats(const Args& a, float* x) {
  for (int64_t g = 0, start = 0, n; start < kK; ++g, start += n) {
    float* const from = x + start;
    n = start < kLeadColumns ? kLeadColumns : kK - start < kRoundCols ? kK - start : kRoundCols;
    const Step s = step_of(a, g, from, n);
    for (int64_t i = 0; i < n; ++i) from[i] = nearest_level(in_steps(from[i], s)) * s.step;
  }
}
#endif

#if !LB_VECTORS
// value(column in stored order) of every column -> packed column order, zeros in padding.
template <typename T> LB_INLINE void spread(float* row, T value) {
  for (int64_t g = 0; g < kGroups / kTerms; ++g) {
    const int64_t from = g * kGroup, n = from + kGroup < kK ? kGroup : kK - from;
    float* to = row + g * kGroupCols;
    const int64_t end = g + 1 < kGroups / kTerms ? kGroupCols : kBlocks / kTerms * 32 - g * kGroupCols;
    for (int64_t i = 0; i < n; ++i) to[i] = value(from + i);
    for (int64_t i = n; i < end; ++i) to[i] = 0.0f;
  }
}

#if LB_RMS
// One over the root of the row's mean square, plus kNormEps. Sixteen sums, so that they can be a vector.
LB_INLINE float rms_unit(const XT* x) {
  float part[16] = {}, sum = 0.0f;
  int64_t i = 0;
  for (; i + 16 <= kK; i += 16)
    for (int j = 0; j < 16; ++j) {
      const float v = from_x(x[i + j]);
      part[j] += v * v;
    }
  for (; i < kK; ++i) sum += from_x(x[i]) * from_x(x[i]);
  for (int j = 0; j < 16; ++j) sum += part[j];
  return 1.0f / __builtin_sqrtf(sum / float(kK) + kNormEps);
}
#endif

// Row of the matrix -> float32 in packed column order, zeros in padding: normalised, rotated, put in order, and, for products of
// floats, rounded. What comes before packing has room behind the row.
LB_INLINE void gather_row([[maybe_unused]] const Args& a, const XT* x, int64_t, float* row) {
  [[maybe_unused]] float* const whole = row + kBlocks * 32;
#if LB_RMS
  const float unit = rms_unit(x);
  const auto input = [&](int64_t i) { return from_x(x[i]) * unit * a.norm_weight[i]; };
#else
  const auto input = [&](int64_t i) { return from_x(x[i]); };
#endif
#if LB_ROTATE
  for (int64_t i = 0; i < kK; ++i) whole[i] = input(i);
  rotate_blocks<LB_ROTATE>(whole, kK, kRotateUnit);
  const auto value = [&](int64_t i) { return whole[stored_column(a, i)]; };
#else
  const auto value = [&](int64_t i) { return input(stored_column(a, i)); };
#endif
#if LB_ROUND
  float* const ordered = whole + (LB_ROTATE ? kK : 0);
  for (int64_t i = 0; i < kK; ++i) ordered[i] = value(i);
  round_floats(a, ordered);
  spread(row, [&](int64_t i) { return ordered[i]; });
#else
  spread(row, value);
#endif
}
#endif

#if LB_LIMBS
#if LB_WORDS
typedef int16_t Digit;
#else
typedef int8_t Digit;
#endif
// Which of a chunk's integers one row of digits holds: all of them, or the low or high digits of 16 bits.
enum Round { kWhole, kLow, kHigh };

// Sums are taken for each of the chunk's kParts scale groups, `stride` apart. kLevelUnit, a power of two, is what the
// weight's integers count.
template <Round WHICH>
LB_INLINE void round_chunk(const float* row, int64_t n, const Step& s, Digit* digits, float* scale, int32_t* init,
                           float* total, int64_t stride) {
  const float step = WHICH == kHigh ? s.step * 256.0f : s.step;
  *scale = step * kLevelUnit;
  for (int64_t p = 0; p < kParts; ++p) {
    int32_t sum = 0;
    for (int64_t i = p * n / kParts; i < (p + 1) * n / kParts; ++i) {
      const int32_t whole = nearest_int(in_steps(row[i], s));
      const int32_t q = WHICH == kHigh ? high_digit(whole) : WHICH == kLow ? low_digit(whole) : whole;
      sum += q;
#if LB_WORDS
      digits[i] = int16_t(q);  // sorted in load_tokens
#elif LB_LIMBS == 1
      digits[i] = int8_t(q);
#else
      digits[i] = high_digit(q);
      digits[i + kChunkCols] = low_digit(q);
#endif
    }
#if LB_ONCE
    total[p * stride] = float(sum) / kLevelUnit;  // the scale meets results
#else
    total[p * stride] = float(sum) * step;
#endif
#if LB_ZERO
    // -sum as the pair (-low, -high) with sum = 128 * high + low; see zero_pair.
    const int32_t high = (sum + 64) >> 7, low = sum - high * 128;
    init[p * stride] = int32_t((uint32_t(-low) & 0xffff) | (uint32_t(-high) << 16));
#else
    init[p * stride] = -kBias * sum;
#endif
  }
}

// Chunk c of a row into row `to` of the prepared activations.
template <Round WHICH>
LB_INLINE void put_chunk(const Args& a, const float* row, int64_t t, int64_t c, int64_t to, const Step& s) {
  const int64_t at = to * a.m + t, part = to * kParts * a.m + t;
  round_chunk<WHICH>(row + chunk_start(c), chunk_columns(c), s, a.xq + at * kTokenStride, a.xs + at, a.xi + part,
                     a.xo + part, a.m);
}

// The largest level is top_of(group); where activations have no format of their own every chunk is a group, and it is
// 127 (one digit) or 127 * 256 + 127 (two).
LB_INLINE void round_row(const Args& a, const float* row, int64_t t) {
  for (int64_t c = 0; c < kInputChunks;) {
    const int64_t g = kLeadChunks ? c >= kLeadChunks : c / kSpanChunks;
    const int64_t next = c < kLeadChunks ? kLeadChunks : c + kSpanChunks, end = next < kInputChunks ? next : kInputChunks;
    const int64_t columns = chunk_start(end - 1) + chunk_columns(end - 1) - chunk_start(c);
    const Step s = step_of(a, g, row + chunk_start(c), columns);
    for (; c < end; ++c) {
      if (c < kDoubleChunks) {
        put_chunk<kLow>(a, row, t, c, c, s);
        put_chunk<kHigh>(a, row, t, c, kChunks + c, s);
      } else {
        put_chunk<kWhole>(a, row, t, c, c, s);
      }
    }
  }
}
#endif
