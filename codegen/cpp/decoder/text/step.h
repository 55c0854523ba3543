// One step: `m` tokens at positions `at`, `at + 1` ... of one sequence.
static int linear(const Linear& l, const float* x, int64_t m, const float* residual, float* out, const State& s,
                  int threads) {
  if (!l.kernel) {
    l.half ? dense<uint16_t>(l, x, m, residual, out, threads) : dense<float>(l, x, m, residual, out, threads);
    return 0;
  }
  int c = 0;
  while (c + 1 < l.kernel->classes && m > l.kernel->tokens[c]) ++c;
  return l.kernel->run[c](x, m, l.weight, l.bias, residual, out, s.scratch, s.scratch_bytes, threads);
}

static void norm_rows(const float* x, const float* w, float* y, int64_t m, int threads) {
  if (m * kHidden < (1 << 15)) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < m; ++t) rms_norm(x + t * kHidden, w, y + t * kHidden, kHidden);
}

// Norms of heads, rotary positions, and keys and values into the cache.
static void place_heads(const Model& model, const Layer& l, const State& s, int64_t layer, float* q, float* k,
                        const float* v, const int64_t* stride, int64_t m, int64_t at, int threads) {
  if (m * kHidden < (1 << 15)) threads = 1;
  const float* rope = model.rope[l.rope];
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < m; ++t) {
    const float *cosine = rope + (at + t) * 2 * kRotary, *sine = cosine + kRotary;
    for (int64_t h = 0; h < kHeads + kKvHeads; ++h) {
      const bool key = h >= kHeads;
      float* x = key ? k + t * stride[1] + (h - kHeads) * kHeadDim : q + t * stride[0] + h * kHeadDim;
      const float* w = key ? l.key_norm : l.query_norm;
      if (w) rms_norm(x, w, x, kHeadDim);
      rotate(x, cosine, sine);
      if (!key) for (int64_t i = 0; i < kHeadDim; ++i) x[i] *= kScale;
    }
#if !LB_PACKED
    for (int64_t h = 0; h < kKvHeads; ++h)
      store_kv(s, layer, h, at + t, k + t * stride[1] + h * kHeadDim, v + t * stride[2] + h * kHeadDim);
#endif
  }
}

static int feed_forward(const Layer& l, const State& s, const float* x, int64_t m, int threads) {
  float* inner = s.inner;
  if (int e = linear(l.gate, x, m, nullptr, inner, s, threads)) return e;
  if (l.gate.n == kInner * 2 || l.up.n) {
    // Gate and up side by side in a row, or two matrices one after the other.
    const bool rows = !l.up.n;
    float* up = rows ? inner + kInner : inner + m * kInner;
    if (!rows) if (int e = linear(l.up, x, m, nullptr, up, s, threads)) return e;
    float* out = inner + 2 * m * kInner;
    const int team = m * kInner < (1 << 15) ? 1 : threads;
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t t = 0; t < m; ++t)
      gated(inner + t * (rows ? 2 : 1) * kInner, up + t * (rows ? 2 : 1) * kInner, out + t * kInner, kInner);
    inner = out;
  }
  return linear(l.down, inner, m, s.hidden, s.hidden, s, threads);
}

struct Clock {
  double* times;
  double last;
  explicit Clock(double* t) : times(t), last(t ? now() : 0.0) {}
  void mark(int part) {
    if (!times) return;
    const double t = now();
    times[part] += t - last, last = t;
  }
};
enum { kEmbedding, kNorms, kQkv, kHeadsPart, kAttention, kOutput, kFeedForward, kHeadPart };

static int layer_step(const Model& model, const State& s, int64_t n, int64_t m, int64_t at, Clock& clock, int threads) {
  const Layer& l = model.layers[n];
  norm_rows(s.hidden, l.input_norm, s.normed, m, threads);
  clock.mark(kNorms);
  const bool fused = !l.k.n;
  float *q = s.qkv, *k = q + (fused ? kQ : m * kQ), *v = k + (fused ? kKv : m * kKv);
  const int64_t row = kQ + 2 * kKv, stride[3] = {fused ? row : kQ, fused ? row : kKv, fused ? row : kKv};
  if (int e = linear(l.q, s.normed, m, nullptr, q, s, threads)) return e;
  if (!fused) {
    if (int e = linear(l.k, s.normed, m, nullptr, k, s, threads)) return e;
    if (int e = linear(l.v, s.normed, m, nullptr, v, s, threads)) return e;
  }
  clock.mark(kQkv);
  place_heads(model, l, s, n, q, k, v, stride, m, at, threads);
  clock.mark(kHeadsPart);
#if LB_PACKED
  packed_attention(s, n, q, k, v, stride, m, at, s.mixed, threads);
#else
  attention(s, n, l.window, q, stride[0], m, at, s.mixed, threads);
#endif
  clock.mark(kAttention);
  if (int e = linear(l.o, s.mixed, m, s.hidden, s.hidden, s, threads)) return e;
  clock.mark(kOutput);
  norm_rows(s.hidden, l.inner_norm, s.normed, m, threads);
  clock.mark(kNorms);
  const int e = feed_forward(l, s, s.normed, m, threads);
  clock.mark(kFeedForward);
  return e;
}

static int64_t largest(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i) best = x[i] > x[best] ? i : best;
  return best;
}
