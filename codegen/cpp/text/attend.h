// Attention of few query rows over a packed cache. A row is one query token of one query head; rows of one key-value
// head are handled together, so that a code is unpacked once for all of them. See codegen/attend.py for the layout.

// What is not quantized: float16 (LB_WINDOW 0), bfloat16 (1) or float32 (2).
#if LB_WINDOW == 2
typedef float Window;
LB_INLINE F load_window(const Window* p) { return fload(p); }
#else
typedef uint16_t Window;
LB_INLINE F load_window(const Window* p) { return LB_WINDOW ? load_bf16(p) : load_f16(p); }
#endif

struct Args {
  const float* q;  // [head][row][kDim]
  const uint8_t *k_plane, *v_plane;
  const uint16_t *k_scale, *k_minimum, *v_scale, *v_minimum;
  const Window *k_window, *v_window;
  const uint8_t* mask;  // [batch][query][column] or null
  float* partial;       // [task][row][kState]
  float* out;           // [head][row][kDim]
  int64_t heads, rows, queries, length, k_stored, v_stored, capacity, k_rows, v_rows;
  int64_t mask_batch, mask_query, splits;
  float scale;
};

constexpr int64_t kState = kDim + 16;  // of one row: largest score, sum of exponentials, then at 16 the output so far

constexpr float kNever = -3.0e38f;  // a score that no probability comes from

// One head's share of the cache.
struct Head {
  const uint8_t *k_plane, *v_plane;
  const uint16_t *k_scale, *k_minimum, *v_scale, *v_minimum;
  const Window *k_window, *v_window;
};

LB_INLINE Head head_of(const Args& g, int64_t h) {
  const int64_t ks = kKeyGroup ? g.capacity / (kKeyGroup ? kKeyGroup : 1) * kDim : g.capacity * kKeyDimGroups;
  const int64_t vs = kValueGroup ? g.capacity / (kValueGroup ? kValueGroup : 1) * kDim : g.capacity * kValueDimGroups;
  return {g.k_plane + h * (g.capacity / 16) * kKeyPanel, g.v_plane + h * (g.capacity / 32) * kValueBlock,
          g.k_scale + h * ks, g.k_minimum + h * ks, g.v_scale + h * vs, g.v_minimum + h * vs,
          g.k_window + h * g.k_rows * kDim, g.v_window + h * g.v_rows * kDim};
}

// x[n] as two signed digits, x = (256 hi + lo) * step, to 2**-16 of the largest magnitude. NaN or infinity: step NaN.
LB_INLINE float to_digits(const float* x, int64_t n, int8_t* hi, int8_t* lo) {
  const uint32_t most = largest_bits(x, n);
  const bool finite = most < 0x7f800000;
  const float largest = lb_float(most);
  const float inverse = finite && largest > 1e-30f ? 32639.0f / largest : 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t q = nearest_int((finite ? x[i] : 0.0f) * inverse);
    hi[i] = high_digit(q), lo[i] = low_digit(q);
  }
  return !finite ? lb_float(0x7fc00000) : inverse == 0.0f ? 0.0f : largest / 32639.0f;
}
LB_INLINE F joined(V hi, V lo) { return fma_(cvt(hi), fset1(256.0f), cvt(lo)); }

// One row of the factor that meets codes, n of x and then zeros up to `room`, as digits (the low ones kPitch behind).
// Scales and minima that vary along the sum are folded into it; base: the sum of minima times x, or of x alone.
LB_INLINE void fold(const float* x, int64_t n, int64_t room, const uint16_t* scale, const uint16_t* minimum,
                    int8_t* digits, float* step, float* base) {
  alignas(64) float y[kPitch];
  F sum = fzero();
  for (int64_t i = 0; i < n; i += 16) {
    const F v = fload(x + i);
    fstore(y + i, scale ? fmul(v, load_f16(scale + i)) : v);
    sum = minimum ? fma_(v, load_f16(minimum + i), sum) : fadd(sum, v);
  }
  for (int64_t i = n; i < room; ++i) y[i] = 0.0f;
  *base = fsum(sum);
  *step = to_digits(y, room, digits, digits + kPitch);
}

// 16 rows of codes, `blocks` blocks `next` bytes apart, times the digits of ROWS rows, in their steps.
template <int ROWS, void (*DOT)(const uint8_t*, const int8_t*, V*)>
LB_INLINE void products(const uint8_t* w, int64_t next, int64_t blocks, const int8_t* digits, const float* step, F* y) {
  V acc[2 * ROWS];
  for (int r = 0; r < 2 * ROWS; ++r) acc[r] = vzero();
  for (int64_t c = 0; c < blocks; ++c) DOT(w + c * next, digits + 32 * c, acc);
  for (int r = 0; r < ROWS; ++r) y[r] = fmul(joined(acc[2 * r], acc[2 * r + 1]), fset1(step[r]));
}

#if LB_KEYS
constexpr int64_t kKeyNext = kKeyPanel / (kCols / 32);

// Scores of stored tokens [a, b). Where groups of tokens share scales these are folded into the query; where every
// token has scales of its own they meet the sums.
template <int ROWS>
LB_INLINE void stored_scores(const Head& h, [[maybe_unused]] const Args& g, const float* q, int64_t a, int64_t b, float* s,
                             int8_t* digits) {
  F y[ROWS];
#if LB_KEY_CHANNELS
  float step[ROWS], base[ROWS];
  for (int64_t t = a; t < b; t += kKeyGroup) {
    const int64_t at = t / kKeyGroup * kDim;
    for (int r = 0; r < ROWS; ++r)
      fold(q + r * kDim, kDim, kCols, h.k_scale + at, h.k_minimum + at, digits + 2 * r * kPitch, step + r, base + r);
    for (int64_t p = t; p < t + kKeyGroup; p += 16) {
      products<ROWS, key_dot<ROWS>>(h.k_plane + p / 16 * kKeyPanel, kKeyNext, kCols / 32, digits, step, y);
      for (int r = 0; r < ROWS; ++r) fstore(s + r * kUnit + p - a, fadd(y[r], fset1(base[r])));
    }
  }
#else
  float step[kKeyDimGroups][ROWS], base[kKeyDimGroups][ROWS];
  for (int64_t e = 0; e < kKeyDimGroups; ++e) {
    const int64_t from = e * kKeyDims, room = kCols - from < kKeyDims ? kCols - from : kKeyDims;
    const int64_t n = kDim - from < room ? kDim - from : room;
    for (int r = 0; r < ROWS; ++r)
      fold(q + r * kDim + from, n, room, nullptr, nullptr, digits + 2 * r * kPitch + from, step[e] + r, base[e] + r);
  }
  for (int64_t p = a; p < b; p += 16) {
    F sum[ROWS];
    for (int r = 0; r < ROWS; ++r) sum[r] = fzero();
    for (int64_t e = 0; e < kKeyDimGroups; ++e) {
      const int64_t first = e * kKeyDims / 32, last = (e + 1) * kKeyDims < kCols ? (e + 1) * kKeyDims / 32 : kCols / 32;
      const uint8_t* w = h.k_plane + p / 16 * kKeyPanel + first * kKeyNext;
      products<ROWS, key_dot<ROWS>>(w, kKeyNext, last - first, digits + 32 * first, step[e], y);
      const F scale = load_f16(h.k_scale + e * g.capacity + p), minimum = load_f16(h.k_minimum + e * g.capacity + p);
      for (int r = 0; r < ROWS; ++r) sum[r] = fma_(minimum, fset1(base[e][r]), fma_(y[r], scale, sum[r]));
    }
    for (int r = 0; r < ROWS; ++r) fstore(s + r * kUnit + p - a, sum[r]);
  }
#endif
}
#endif

// Scores of tokens [from, b) that are not quantized.
template <int ROWS> LB_INLINE void window_scores(const Head& h, const Args& g, const float* q, int64_t a, int64_t from,
                                                 int64_t b, float* s) {
  for (int64_t t = from; t < b; ++t) {
    const Window* key = h.k_window + t % g.k_rows * kDim;
    for (int r = 0; r < ROWS; ++r) {
      F sum = fzero();
      for (int64_t d = 0; d < kDim; d += 16) sum = fma_(fload(q + r * kDim + d), load_window(key + d), sum);
      s[r * kUnit + t - a] = fsum(sum);
    }
  }
}

#if LB_VALUES
// state += probabilities p of stored tokens [a, b) times values; p is zero behind b, up to a whole unit. Here scales of
// single tokens are folded into the probabilities, and those of groups of tokens meet the sums.
template <int ROWS>
LB_INLINE void stored_values(const Head& h, [[maybe_unused]] const Args& g, const float* p, int64_t a, int64_t b,
                             float* state, int8_t* digits) {
  F y[ROWS];
  float step[ROWS], base[ROWS];
#if LB_VALUE_CHANNELS
  for (int64_t t = a; t < b; t += kValueGroup) {
    const int64_t n = kValueGroup, first = 0, last = kDim / 16;
    const uint16_t *scale = nullptr, *minimum = nullptr;
    const uint16_t *of_sums = h.v_scale + t / kValueGroup * kDim, *added = h.v_minimum + t / kValueGroup * kDim;
#else
  const int64_t n = (b - a + 31) / 32 * 32, t = a;
  for (int64_t e = 0; e < kValueDimGroups; ++e) {
    const int64_t first = e * kValueDims / 16;
    const int64_t last = (e + 1) * kValueDims < kDim ? (e + 1) * kValueDims / 16 : kDim / 16;
    const uint16_t *scale = h.v_scale + e * g.capacity + a, *minimum = h.v_minimum + e * g.capacity + a;
#endif
    for (int r = 0; r < ROWS; ++r)
      fold(p + r * kUnit + t - a, n, n, scale, minimum, digits + 2 * r * kPitch, step + r, base + r);
    for (int64_t j = first; j < last; ++j) {
      const uint8_t* w = h.v_plane + t / 32 * kValueBlock + j * (kValueBlock / (kDim / 16));
      products<ROWS, value_dot<ROWS>>(w, kValueBlock, n / 32, digits, step, y);
      for (int r = 0; r < ROWS; ++r) {
        float* to = state + r * kState + 16 + j * 16;
#if LB_VALUE_CHANNELS
        y[r] = fma_(y[r], load_f16(of_sums + j * 16), fmul(fset1(base[r]), load_f16(added + j * 16)));
#else
        y[r] = fadd(y[r], fset1(base[r]));
#endif
        fstore(to, fadd(fload(to), y[r]));
      }
    }
  }
}
#endif

// The same for tokens [from, b) that are not quantized.
template <int ROWS> LB_INLINE void window_values(const Head& h, const Args& g, const float* p, int64_t a, int64_t from,
                                                 int64_t b, float* state) {
  for (int64_t d = 0; d < kDim; d += 16) {
    F sum[ROWS];
    for (int r = 0; r < ROWS; ++r) sum[r] = fload(state + r * kState + 16 + d);
    for (int64_t t = from; t < b; ++t) {
      const F v = load_window(h.v_window + t % g.v_rows * kDim + d);
      for (int r = 0; r < ROWS; ++r) sum[r] = fma_(fset1(p[r * kUnit + t - a]), v, sum[r]);
    }
    for (int r = 0; r < ROWS; ++r) fstore(state + r * kState + 16 + d, sum[r]);
  }
}

// Scales, causality and the mask; then scores [0, n) become probabilities relative to the largest so far.
LB_INLINE void online_softmax(const Args& g, int64_t head, int64_t row, int64_t a, int64_t n, float* s, float* state) {
  const int64_t query = row % g.queries, seen = g.length - g.queries + 1 + query - a;
  for (int64_t i = 0; i < n; ++i) s[i] = i < seen ? s[i] * g.scale : kNever;
  if (g.mask) {
    const uint8_t* keep = g.mask + head / g.heads * g.mask_batch + query * g.mask_query + a;
    for (int64_t i = 0; i < n; ++i) s[i] = keep[i] ? s[i] : kNever;
  }
  for (int64_t i = n; i < kUnit; ++i) s[i] = kNever;
  float lane[16];
  for (int i = 0; i < 16; ++i) lane[i] = state[0];
  for (int64_t i = 0; i < kUnit; i += 16)
    for (int j = 0; j < 16; ++j) lane[j] = s[i + j] > lane[j] ? s[i + j] : lane[j];
  float most = lane[0];
  for (int j = 1; j < 16; ++j) most = lane[j] > most ? lane[j] : most;
  for (int64_t i = 0; i < kUnit; ++i) {
    const float e = lb_exp(s[i] - most);
    s[i] = s[i] <= kNever ? 0.0f : e;
  }
  const float fade = state[0] <= kNever ? 0.0f : lb_exp(state[0] - most);
  F sum = fzero();
  for (int64_t i = 0; i < kUnit; i += 16) sum = fadd(sum, fload(s + i));
  state[0] = most;
  state[1] = state[1] * fade + fsum(sum);
  for (int64_t d = 16; d < kState; d += 16) fstore(state + d, fmul(fload(state + d), fset1(fade)));
}

// Tokens [a, b), at most a unit, for ROWS rows.
template <int ROWS> static void unit(const Args& g, int64_t head, int64_t a, int64_t b, int64_t row, float* state) {
  alignas(64) float s[ROWS * kUnit];
  alignas(64) int8_t digits[2 * ROWS * kPitch];
  const Head h = head_of(g, head);
  const float* q = g.q + (head * g.rows + row) * kDim;
  const int64_t ks = g.k_stored < a ? a : g.k_stored < b ? g.k_stored : b;
  const int64_t vs = g.v_stored < a ? a : g.v_stored < b ? g.v_stored : b;
#if LB_KEYS
  stored_scores<ROWS>(h, g, q, a, ks, s, digits);
#endif
  window_scores<ROWS>(h, g, q, a, ks, b, s);
  for (int r = 0; r < ROWS; ++r) online_softmax(g, head, row + r, a, b - a, s + r * kUnit, state + r * kState);
  window_values<ROWS>(h, g, s, a, vs, b, state);
#if LB_VALUES
  if (vs == a) return;
  for (int r = 0; r < ROWS; ++r)
    for (int64_t i = vs - a; i < b - a; ++i) s[r * kUnit + i] = 0.0f;
  stored_values<ROWS>(h, g, s, a, vs, state, digits);
#endif
}

// Whether a query may look at any of tokens [a, b): a cache is often allocated for many more than it holds.
LB_INLINE bool looked_at(const Args& g, int64_t head, int64_t a, int64_t b) {
  if (!g.mask) return true;
  const uint8_t* keep = g.mask + head / g.heads * g.mask_batch;
  for (int64_t i = 0; i < g.queries; ++i)
    for (int64_t t = a; t < b; ++t)
      if (keep[i * g.mask_query + t]) return true;
  return false;
}

LB_INLINE void one_task(const Args& g, int64_t task) {
  const int64_t head = task / g.splits, split = task % g.splits, units = (g.length + kUnit - 1) / kUnit;
  float* state = g.partial + task * g.rows * kState;
  for (int64_t r = 0; r < g.rows; ++r) {
    memset(state + r * kState, 0, kState * 4);
    state[r * kState] = kNever;
  }
  for (int64_t u = units * split / g.splits; u < units * (split + 1) / g.splits; ++u) {
    const int64_t a = u * kUnit, b = a + kUnit < g.length ? a + kUnit : g.length;
    for (int64_t row = 0; row < g.rows && looked_at(g, head, a, b);) {
      float* at = state + row * kState;
#if LB_ROWS > 1
      const int64_t left = g.rows - row;
      if (left >= 4) unit<4>(g, head, a, b, row, at), row += 4;
      else if (left == 3) unit<3>(g, head, a, b, row, at), row += 3;
      else if (left == 2) unit<2>(g, head, a, b, row, at), row += 2;
      else
#endif
      unit<1>(g, head, a, b, row, at), row += 1;
    }
  }
}

// The splits of one row, joined. A row whose every token is masked gives zeros.
LB_INLINE void join(const Args& g, int64_t head, int64_t row) {
  const float* first = g.partial + (head * g.splits * g.rows + row) * kState;
  const int64_t next = g.rows * kState;
  float most = kNever, sum = 0.0f;
  for (int64_t i = 0; i < g.splits; ++i) most = first[i * next] > most ? first[i * next] : most;
  float* out = g.out + (head * g.rows + row) * kDim;
  memset(out, 0, kDim * 4);
  for (int64_t i = 0; i < g.splits; ++i) {
    const float* from = first + i * next;
    if (from[0] <= kNever) continue;
    const float part = lb_exp(from[0] - most);
    sum += part * from[1];
    for (int64_t d = 0; d < kDim; ++d) out[d] += part * from[16 + d];
  }
  const float inverse = sum > 0.0f || sum != sum ? 1.0f / sum : 0.0f;
  for (int64_t d = 0; d < kDim; ++d) out[d] *= inverse;
}

// All rows of `heads` key-value heads (those of all sequences).
static void run(const Args& g, int64_t heads, int threads) {
  const int64_t tasks = heads * g.splits;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
    for (int64_t i = tasks * part / parts; i < tasks * (part + 1) / parts; ++i) one_task(g, i);
#pragma omp barrier
    for (int64_t i = part; i < heads * g.rows; i += parts) join(g, i / g.rows, i % g.rows);
  }
}
