// One step: `m` tokens at positions `at`, `at + 1` ... of one sequence.
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
  // A projection without a matrix of its own lies behind another's results: keys behind queries, values behind either.
  const bool keys_in = !l.k.n, values_in = !l.v.n && l.q.n == kQ + (keys_in ? 2 : 1) * kKv;
  const int64_t rest = keys_in ? kQ + kKv : kQ, key_row = keys_in ? l.q.n : l.k.n;
  float *q = s.qkv, *own = q + m * l.q.n, *k = keys_in ? q + kQ : own;
  float* v = values_in ? q + rest : l.v.n ? own + m * l.k.n : own + kKv;
  const int64_t stride[3] = {l.q.n, key_row, values_in ? l.q.n : l.v.n ? kKv : key_row};
  if (int e = linear(l.q, s.normed, m, nullptr, q, s, threads)) return e;
  if (l.k.n)
    if (int e = linear(l.k, s.normed, m, nullptr, k, s, threads)) return e;
  if (l.v.n)
    if (int e = linear(l.v, s.normed, m, nullptr, v, s, threads)) return e;
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
#if LB_MIXTURES
  const int e = l.mixture ? mixture(*l.mixture, s, n, s.normed, m, threads)
                          : feed_forward(l.mlp, s, s.normed, m, s.hidden, s.hidden, threads);
#else
  const int e = feed_forward(l.mlp, s, s.normed, m, s.hidden, s.hidden, threads);
#endif
  clock.mark(kFeedForward);
  return e;
}

static int64_t largest(const float* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i) best = x[i] > x[best] ? i : best;
  return best;
}
