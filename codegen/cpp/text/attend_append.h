// Writing tokens into a packed cache: into the window, and from there, when the format says so, to codes.

#if LB_WINDOW == 2
LB_INLINE Window stored(float x) { return x; }
#elif LB_WINDOW == 1
LB_INLINE Window stored(float x) { return to_bf16(x); }
#else
LB_INLINE Window stored(float x) { return to_f16(x < -65504.0f ? -65504.0f : x > 65504.0f ? 65504.0f : x); }
#endif

// A scale for numbers from lo to hi.
LB_INLINE uint16_t scale_of(float lo, float hi, float levels) {
  const float span = (hi - lo) / levels;
  return to_f16(span > 0.0f && span < 5.9604645e-8f ? 5.9604645e-8f : span);
}
LB_INLINE uint32_t code_of(float x, float lo, float scale, float levels) {
  float v = (x - lo) / (scale > 0.0f ? scale : 1.0f);
  v = (v + 12582912.0f) - 12582912.0f;  // to the nearest integer, ties to even
  return uint32_t(int32_t(v < 0.0f ? 0.0f : v > levels ? levels : v));
}
template <int BITS> LB_INLINE void put_code(uint8_t* at, int shift, uint32_t code) {
  *at = uint8_t((*at & ~(((1u << BITS) - 1) << shift)) | code << shift);
}

// Keys and values differ in where a code lies, and in their sizes.
struct Side {
  uint8_t* plane;
  uint16_t *scale, *minimum;
  Window* window;
  int64_t capacity, rows;
};

template <class P> static void quantize_token(const Side& c, const uint16_t* x, int64_t t) {
  constexpr float levels = float((1 << P::bits) - 1);
  alignas(64) float v[kDim];
  uint32_t code[kDim];
  for (int64_t d = 0; d < kDim; d += 16) fstore(v + d, load_f16(x + d));
  for (int64_t e = 0; e < P::dim_groups; ++e) {
    const int64_t from = e * P::dims, to = from + P::dims < kDim ? from + P::dims : kDim;
    float lo[16], hi[16];
    for (int i = 0; i < 16; ++i) lo[i] = hi[i] = v[from + i];
    for (int64_t d = from; d < to; d += 16)
      for (int i = 0; i < 16; ++i) {
        lo[i] = v[d + i] < lo[i] ? v[d + i] : lo[i];
        hi[i] = v[d + i] > hi[i] ? v[d + i] : hi[i];
      }
    for (int i = 1; i < 16; ++i) lo[0] = lo[i] < lo[0] ? lo[i] : lo[0], hi[0] = hi[i] > hi[0] ? hi[i] : hi[0];
    const uint16_t scale = scale_of(lo[0], hi[0], levels);
    c.scale[e * c.capacity + t] = scale, c.minimum[e * c.capacity + t] = to_f16(lo[0]);
    const float low = lo[0], step = from_f16(scale);
    for (int64_t d = from; d < to; ++d) code[d] = code_of(v[d], low, step, levels);
  }
  for (int64_t d = 0; d < kDim; ++d) put_code<P::bits>(c.plane + P::at(t, d), P::shift(t, d), code[d]);
}

template <class P> static void quantize_channels(const Side& c, const uint16_t* x, int64_t t0) {
  constexpr float levels = float((1 << P::bits) - 1);
  alignas(64) float v[P::group * 16];
  for (int64_t d = 0; d < kDim; d += 16) {
    float lo[16], hi[16], step[16];
    for (int64_t i = 0; i < P::group; ++i) fstore(v + i * 16, load_f16(x + i * kDim + d));
    for (int i = 0; i < 16; ++i) lo[i] = hi[i] = v[i];
    for (int64_t k = 16; k < P::group * 16; k += 16)
      for (int i = 0; i < 16; ++i) {
        lo[i] = v[k + i] < lo[i] ? v[k + i] : lo[i];
        hi[i] = v[k + i] > hi[i] ? v[k + i] : hi[i];
      }
    for (int i = 0; i < 16; ++i) {
      const uint16_t scale = scale_of(lo[i], hi[i], levels);
      const int64_t at = t0 / P::group * kDim + d + i;
      c.scale[at] = scale, c.minimum[at] = to_f16(lo[i]);
      step[i] = from_f16(scale);
    }
    for (int64_t k = 0; k < P::group; ++k) {
      uint32_t code[16];
      for (int i = 0; i < 16; ++i) code[i] = code_of(v[k * 16 + i], lo[i], step[i], levels);
      for (int i = 0; i < 16; ++i) put_code<P::bits>(c.plane + P::at(t0 + k, d + i), P::shift(t0 + k, d + i), code[i]);
    }
  }
}

// One head's part of the cache's tensors, keys' (first 0) or values' (first 4); `rows` of the window.
LB_INLINE Side side_of(void* const* state, int first, int64_t head, int64_t capacity, int64_t rows) {
  const bool key = first == 0;
  const int64_t group = key ? kKeyGroup : kValueGroup, groups = key ? kKeyDimGroups : kValueDimGroups;
  const int64_t plane = key ? capacity / 16 * kKeyPanel : capacity / 32 * kValueBlock;
  const int64_t sides = group ? capacity / (group + !group) * kDim : capacity * groups;
  return {(uint8_t*)state[first] + head * plane, (uint16_t*)state[first + 1] + head * sides,
          (uint16_t*)state[first + 2] + head * sides, (Window*)state[first + 3] + head * rows * kDim, capacity, rows};
}

// Tokens x [n][kDim], `stride` apart, behind the first `length`.
template <class P>
static void append_side(const Side& c, const float* x, int64_t stride, int64_t n, int64_t length) {
  Window row[kDim];
  for (int64_t i = 0; i < n; ++i) {
    const int64_t t = length + i;
    for (int64_t d = 0; d < kDim; ++d) row[d] = stored(x[i * stride + d]);
    if constexpr (P::bits < 16 && P::group == 0) {
      if (c.rows == 0) {
        quantize_token<P>(c, row, t);
        continue;
      }
      if (t >= c.rows) quantize_token<P>(c, c.window + t % c.rows * kDim, t - c.rows);
    }
    memcpy(c.window + t % c.rows * kDim, row, sizeof(row));
    if constexpr (P::bits < 16 && P::group > 0)
      if ((t + 1) % c.rows == 0)
        for (int64_t from = 0; from < c.rows; from += P::group)
          quantize_channels<P>(c, c.window + from * kDim, t + 1 - c.rows + from);
  }
}

// Token t as it is in the cache: from the window if `stored`, the number of quantized tokens, says so.
template <class P> [[maybe_unused]] static void read_token(const Side& c, int64_t t, int64_t stored, float* x) {
  if constexpr (P::bits < 16) {
    if (t < stored) {
      constexpr uint32_t mask = (1u << P::bits) - 1;
      for (int64_t d = 0; d < kDim; ++d) {
        const int64_t at = P::group ? t / (P::group + !P::group) * kDim + d : d / P::dims * c.capacity + t;
        const uint32_t code = uint32_t(c.plane[P::at(t, d)]) >> P::shift(t, d) & mask;
        x[d] = float(code) * from_f16(c.scale[at]) + from_f16(c.minimum[at]);
      }
      return;
    }
  }
  for (int64_t d = 0; d < kDim; d += 16) fstore(x + d, load_window(c.window + t % c.rows * kDim + d));
}
