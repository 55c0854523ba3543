// Runs `m` tokens and writes the logits of the last `keep` of them; `next` (or null) gets the largest of the last.
// Returns 0, or the status of the kernel that refused, or -1 for arguments out of range.
extern "C" __attribute__((visibility("default"))) int lb_step(const Model* model, const State* s, const int64_t* tokens,
                                                              int64_t m, int64_t at, int64_t keep, float* logits,
                                                              int64_t* next, double* times, int threads) {
  if (m < 1 || m > s->tokens || at < 0 || at + m > s->context || keep < 0 || keep > m || threads < 1 ||
      threads > s->threads)
    return -1;
  Clock clock(times);
  for (int64_t t = 0; t < m; ++t) {
    if (tokens[t] < 0 || tokens[t] >= kVocab) return -1;
    float* to = s->hidden + t * kHidden;
    for (int64_t i = 0; i < kHidden; ++i) to[i] = from_embedding(model->embedding, tokens[t] * kHidden + i) * kEmbedScale;
  }
  clock.mark(kEmbedding);
  for (int64_t n = 0; n < kLayers; ++n)
    if (int e = layer_step(*model, *s, n, m, at, clock, threads)) return e;
  if (!keep) return 0;
  const float* last = s->hidden + (m - keep) * kHidden;
  norm_rows(last, model->norm, s->normed, keep, threads);
  clock.mark(kNorms);
  if (int e = linear(model->head, s->normed, keep, nullptr, logits, *s, threads)) return e;
  if (next) *next = largest(logits + (keep - 1) * kVocab, kVocab);
  clock.mark(kHeadPart);
  return 0;
}
