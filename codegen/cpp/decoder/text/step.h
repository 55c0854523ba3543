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
