// Attention over the cache. Keys lie in blocks of 16 positions, [head][block][dim][16], so that a vector holds one
// coordinate of 16 keys; values in rows of kWidth, [head][position][kWidth]. Both products are then plain
// multiply-adds with a broadcast number.
#if LB_KV_HALF
typedef uint16_t KV;
LB_INLINE F load_kv(const KV* p) { return load_f16(p); }
LB_INLINE KV to_kv(float x) { return to_f16(x); }
#else
typedef float KV;
LB_INLINE F load_kv(const KV* p) { return fload(p); }
LB_INLINE KV to_kv(float x) { return x; }
#endif

LB_INLINE KV* keys_of(const State& s, int64_t layer, int64_t head) {
  return (KV*)s.keys + (layer * kKvHeads + head) * s.context * kHeadDim;
}
LB_INLINE KV* values_of(const State& s, int64_t layer, int64_t head) {
  return (KV*)s.values + (layer * kKvHeads + head) * s.context * kWidth;
}

static void store_kv(const State& s, int64_t layer, int64_t head, int64_t at, const float* key, const float* value) {
  KV* k = keys_of(s, layer, head) + at / 16 * 16 * kHeadDim + at % 16;
  KV* v = values_of(s, layer, head) + at * kWidth;
  for (int64_t i = 0; i < kHeadDim; ++i) k[i * 16] = to_kv(key[i]);
  for (int64_t i = 0; i < kHeadDim; ++i) v[i] = to_kv(value[i]);
}

// One row of queries: where it is, where its result goes, and which positions it sees: [from, to).
struct Row {
  const float* q;
  float* out;
  int64_t from, to;
};

// Products of R rows with B blocks of keys from block b on.
template <int R, int B> LB_INLINE void score_tile(const KV* keys, const Row* rows, int64_t b, float* s, int64_t stride) {
  F sum[B][R];
  for (int i = 0; i < B; ++i)
    for (int r = 0; r < R; ++r) sum[i][r] = fzero();
  const KV* k = keys + b * 16 * kHeadDim;
  for (int64_t d = 0; d < kHeadDim; ++d) {
    F u[B];
    for (int i = 0; i < B; ++i) u[i] = load_kv(k + (i * kHeadDim + d) * 16);
    for (int r = 0; r < R; ++r) {
      const F q = fset1(rows[r].q[d]);
      for (int i = 0; i < B; ++i) sum[i][r] = fma_(u[i], q, sum[i][r]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < B; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) fstore(s + r * stride + (b + i) * 16, sum[i][r]);
}

// Products of R rows with blocks [b0, b1) of keys.
template <int R> static void scores(const KV* keys, const Row* rows, int64_t b0, int64_t b1, float* s, int64_t stride) {
  int64_t b = b0;
  for (; b + kScoreBlocks <= b1; b += kScoreBlocks) score_tile<R, kScoreBlocks>(keys, rows, b, s, stride);
  for (; b < b1; ++b) score_tile<R, 1>(keys, rows, b, s, stride);
}

// exp(s - largest) over [from, to), zero elsewhere in [first, last); returns the sum. Bounds of blocks: multiples of 16.
static float soften(float* s, int64_t from, int64_t to, int64_t first, int64_t last) {
  for (int64_t i = first; i < from; ++i) s[i] = -3.0e38f;
  for (int64_t i = to; i < last; ++i) s[i] = -3.0e38f;
  alignas(64) float most[16];
  for (int j = 0; j < 16; ++j) most[j] = -3.0e38f;
  for (int64_t i = first; i < last; i += 16)
    for (int j = 0; j < 16; ++j) most[j] = s[i + j] > most[j] ? s[i + j] : most[j];
  float top = most[0];
  for (int j = 1; j < 16; ++j) top = most[j] > top ? most[j] : top;
  for (int64_t i = first; i < last; ++i) s[i] = lb_exp(s[i] - top);
  for (int64_t i = first; i < from; ++i) s[i] = 0.0f;
  for (int64_t i = to; i < last; ++i) s[i] = 0.0f;
  F sum = fzero();
  for (int64_t i = first; i < last; i += 16) sum = fadd(sum, fload(s + i));
  return fsum(sum);
}

// C vectors of the weighted sum of values, from column `at`.
template <int R, int C>
static void mix(const KV* values, const float* s, int64_t stride, int64_t from, int64_t to, int64_t at,
                const float* scale, const Row* rows) {
  F acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = fzero();
  for (int64_t j = from; j < to; ++j) {
    F v[C];
    for (int c = 0; c < C; ++c) v[c] = load_kv(values + j * kWidth + at + c * 16);
    for (int r = 0; r < R; ++r) {
      const F p = fset1(s[r * stride + j]);
      for (int c = 0; c < C; ++c) acc[r][c] = fma_(v[c], p, acc[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      alignas(64) float part[16];
      fstore(part, fmul(acc[r][c], fset1(scale[r])));
      const int64_t column = at + c * 16;
      for (int64_t i = 0; i < 16 && column + i < kHeadDim; ++i) rows[r].out[column + i] = part[i];
    }
}

template <int R> static void attend(const KV* keys, const KV* values, const Row* rows, float* s, int64_t stride) {
  int64_t from = rows[0].from, to = rows[0].to;
  for (int r = 1; r < R; ++r) {
    from = rows[r].from < from ? rows[r].from : from;
    to = rows[r].to > to ? rows[r].to : to;
  }
  const int64_t b0 = from / 16, b1 = (to + 15) / 16;
  scores<R>(keys, rows, b0, b1, s, stride);
  float scale[R];
  for (int r = 0; r < R; ++r) scale[r] = 1.0f / soften(s + r * stride, rows[r].from, rows[r].to, b0 * 16, b1 * 16);
  int64_t at = 0;
  for (; at + 16 * kMixed <= kWidth; at += 16 * kMixed)
    mix<R, kMixed>(values, s, stride, from, to, at, scale, rows);
  for (; at < kWidth; at += 16) mix<R, 1>(values, s, stride, from, to, at, scale, rows);
}

// All heads of tokens [0, m) that stand at positions `at`, `at + 1` ...; their keys and values are stored already.
static void attention(const State& s, int64_t layer, int64_t window, const float* q, int64_t q_stride, int64_t m,
                      int64_t at, float* out, int threads) {
  constexpr int64_t group = kHeads / kKvHeads, tokens = 16;
  const int64_t blocks = (m + tokens - 1) / tokens, stride = s.context;
  if (m * (at + m) * kHeads * kHeadDim < (1 << 16)) threads = 1;
#pragma omp parallel num_threads(threads)
  {
    float* room = s.scores + omp_get_thread_num() * 4 * stride;
#pragma omp for schedule(dynamic, 1)
    for (int64_t n = 0; n < kKvHeads * blocks; ++n) {
      // Later tokens see more: they go first.
      const int64_t head = n % kKvHeads, t0 = (blocks - 1 - n / kKvHeads) * tokens;
      const int64_t rows = ((t0 + tokens < m ? t0 + tokens : m) - t0) * group;
      const KV *keys = keys_of(s, layer, head), *values = values_of(s, layer, head);
      for (int64_t first = 0; first < rows; first += 4) {
        Row row[4];
        const int count = int(rows - first < 4 ? rows - first : 4);
        for (int r = 0; r < count; ++r) {
          const int64_t t = t0 + (first + r) / group, h = head * group + (first + r) % group, to = at + t + 1;
          const int64_t from = window > 0 && to > window ? to - window : 0;
          row[r] = Row{q + t * q_stride + h * kHeadDim, out + (t * kHeads + h) * kHeadDim, from, to};
        }
        if (count == 4) attend<4>(keys, values, row, room, stride);
        else if (count == 3) attend<3>(keys, values, row, room, stride);
        else if (count == 2) attend<2>(keys, values, row, room, stride);
        else attend<1>(keys, values, row, room, stride);
      }
    }
  }
}
