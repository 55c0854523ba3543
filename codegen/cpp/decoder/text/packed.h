// Keys and values in a packed cache, read and written by what `codegen/cpp/attend.py` prints (namespace `packed`). A
// step of few tokens appends them and attends to the cache itself. A longer one, a prompt, attends to its own keys and
// values as they are and to dequantized earlier ones, in float32 buffers of one layer, and appends afterwards.
LB_INLINE packed::Args packed_args(const State& s, int64_t layer, int64_t m, int64_t at) {
  packed::Args g = {};
  g.k_plane = (const uint8_t*)s.packed[0], g.v_plane = (const uint8_t*)s.packed[4];
  g.k_scale = (const uint16_t*)s.packed[1], g.v_scale = (const uint16_t*)s.packed[5];
  g.k_minimum = (const uint16_t*)s.packed[2], g.v_minimum = (const uint16_t*)s.packed[6];
  g.k_window = (const uint16_t*)s.packed[3], g.v_window = (const uint16_t*)s.packed[7];
  g.capacity = s.context, g.k_rows = s.k_rows, g.v_rows = s.v_rows;
  const packed::Head h = packed::head_of(g, layer * kKvHeads);
  g.k_plane = h.k_plane, g.k_scale = h.k_scale, g.k_minimum = h.k_minimum, g.k_window = h.k_window;
  g.v_plane = h.v_plane, g.v_scale = h.v_scale, g.v_minimum = h.v_minimum, g.v_window = h.v_window;
  g.heads = kKvHeads, g.queries = m, g.rows = m * (kHeads / kKvHeads), g.length = at + m, g.scale = 1.0f;
  g.k_stored = keys_stored(at + m), g.v_stored = values_stored(at + m), g.partial = s.partial;
  return g;
}

// Rotates `heads` heads of `m` rows, where the format wants that. Twice is nothing.
[[maybe_unused]] static void rotate_heads(float* x, int64_t stride, int64_t m, int64_t heads) {
#if LB_KV_ROTATE
  for (int64_t t = 0; t < m; ++t) rotate_blocks<kHeadDim>(x + t * stride, heads * kHeadDim, kRotateUnit);
#endif
}

static void packed_append(const State& s, int64_t layer, float* k, const float* v, const int64_t* stride, int64_t m,
                          int64_t at, int threads) {
  rotate_heads(k, stride[1], m, kKvHeads);
  if (kKvHeads * m <= 64) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t h = 0; h < kKvHeads; ++h) {
    const int64_t head = layer * kKvHeads + h;
    const packed::Side keys = packed::side_of(s.packed, 0, head, s.context, s.k_rows);
    const packed::Side values = packed::side_of(s.packed, 4, head, s.context, s.v_rows);
    packed::append_side<packed::Keys>(keys, k + h * kHeadDim, stride[1], m, at);
    packed::append_side<packed::Values>(values, v + h * kHeadDim, stride[2], m, at);
  }
}

// Earlier tokens [0, at) as numbers, into the buffers of one layer.
static void unpack_earlier(const State& s, int64_t layer, int64_t at, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t h = 0; h < kKvHeads; ++h) {
    const int64_t head = layer * kKvHeads + h;
    const packed::Side keys = packed::side_of(s.packed, 0, head, s.context, s.k_rows);
    const packed::Side values = packed::side_of(s.packed, 4, head, s.context, s.v_rows);
    alignas(64) float k[kHeadDim], v[kHeadDim];
    for (int64_t t = 0; t < at; ++t) {
      packed::read_token<packed::Keys>(keys, t, keys_stored(at), k);
      packed::read_token<packed::Values>(values, t, values_stored(at), v);
      rotate_heads(k, 0, 1, 1);
      store_kv(s, 0, h, t, k, v);
    }
  }
}

static void packed_prompt(const State& s, int64_t layer, const float* q, float* k, const float* v,
                          const int64_t* stride, int64_t m, int64_t at, float* out, int threads) {
  if (at) unpack_earlier(s, layer, at, threads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < m; ++t)
    for (int64_t h = 0; h < kKvHeads; ++h)
      store_kv(s, 0, h, at + t, k + t * stride[1] + h * kHeadDim, v + t * stride[2] + h * kHeadDim);
  attention(s, 0, 0, q, stride[0], m, at, out, threads);
  packed_append(s, layer, k, v, stride, m, at, threads);
}

static void packed_attention(const State& s, int64_t layer, float* q, float* k, const float* v, const int64_t* stride,
                             int64_t m, int64_t at, float* out, int threads) {
  if (m > kMaxQueries) return packed_prompt(s, layer, q, k, v, stride, m, at, out, threads);
  packed_append(s, layer, k, v, stride, m, at, threads);
  rotate_heads(q, stride[0], m, kHeads);
  packed::Args g = packed_args(s, layer, m, at);
  // Rows of a key-value head lie together there, and tokens here; of one token both are the same.
  float *rows = m == 1 ? q : s.few, *results = m == 1 ? out : s.few + kMaxQueries * kQ;
  g.q = rows, g.out = results;
  const size_t size = kHeadDim * 4;
  for (int64_t t = 0; m > 1 && t < m; ++t)
    for (int64_t h = 0; h < kHeads; ++h)
      memcpy(rows + (h * m + t) * kHeadDim, q + t * stride[0] + h * kHeadDim, size);
  if (kQ * m * g.length < (1 << 17)) threads = 1;  // waking others costs as much
  const int64_t units = (g.length + packed::kUnit - 1) / packed::kUnit, most = (4 * threads + kKvHeads - 1) / kKvHeads;
  g.splits = threads == 1 ? 1 : units < most ? units : most;
  packed::run(g, kKvHeads, threads);
  for (int64_t t = 0; m > 1 && t < m; ++t)
    for (int64_t h = 0; h < kHeads; ++h)
      memcpy(out + (t * kHeads + h) * kHeadDim, results + (h * m + t) * kHeadDim, size);
}
