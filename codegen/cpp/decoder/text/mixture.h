// Mixtures of experts: a router's float32 softmax, the largest probabilities, and each chosen expert on its own tokens,
// whose rows are then contiguous. Experts add to the residual stream in the order of their numbers, whatever the number
// of threads or tokens of a step.
LB_INLINE int32_t* chosen_of(const State& s, int64_t layer) { return s.chosen + layer * s.tokens * kActive; }

// One token's experts and their shares, from its router's logits `p` [count], which are overwritten. Of equal ones, the
// first.
static void choose(const Mixture& x, float* p, int32_t* chosen, float* shares) {
  float top = p[0], sum = 0.0f, kept = 0.0f;
  for (int64_t i = 1; i < x.count; ++i) top = p[i] > top ? p[i] : top;
  for (int64_t i = 0; i < x.count; ++i) p[i] = lb_exp(p[i] - top), sum += p[i];
  for (int64_t j = 0; j < x.active; ++j) {
    int64_t best = -1;  // those that are taken are negative; what is no number may be chosen
    for (int64_t i = 0; i < x.count; ++i)
      if (!(p[i] < 0.0f) && (best < 0 || p[i] > p[best])) best = i;
    chosen[j] = int32_t(best), shares[j] = p[best] / sum, kept += shares[j];
    p[best] = -1.0f;
  }
  for (int64_t j = 0; x.normalised && j < x.active; ++j) shares[j] /= kept;
}

// Places of `chosen` (token * active + j), sorted by expert and then by token; those of expert e end at s.ends[e].
static void sort_places(const Mixture& x, const State& s, const int32_t* chosen, int64_t m) {
  const int64_t places = m * x.active;
  for (int64_t e = 0; e < x.count; ++e) s.ends[e] = 0;
  for (int64_t i = 0; i < places; ++i) ++s.ends[chosen[i]];
  int32_t at = 0;
  for (int64_t e = 0; e < x.count; ++e) {
    const int32_t count = s.ends[e];
    s.ends[e] = at, at += count;
  }
  for (int64_t i = 0; i < places; ++i) s.places[s.ends[chosen[i]]++] = int32_t(i);
}

// One expert on the `count` tokens whose places are given, of `m` in the step.
static int expert(const Mixture& x, const Gated& g, const State& s, const float* in, const int32_t* places,
                  int64_t count, int64_t m, int threads) {
  const float* rows = in;
  const int team = count * kHidden < (1 << 15) ? 1 : threads;
  if (count < m) {
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t i = 0; i < count; ++i)
      memcpy(s.rows + i * kHidden, in + places[i] / x.active * kHidden, kHidden * sizeof(float));
    rows = s.rows;
  }
  if (int e = feed_forward(g, s, rows, count, nullptr, s.given, threads)) return e;
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t i = 0; i < count; ++i)
    add_row(s.hidden + places[i] / x.active * kHidden, s.given + i * kHidden, s.shares[places[i]]);
  return 0;
}

// The expert that every token goes to, scaled with the sigmoid of a number of its own. s.shares has been read.
static int shared_expert(const Mixture& x, const State& s, const float* in, int64_t m, int threads) {
  if (int e = feed_forward(x.shared, s, in, m, nullptr, s.given, threads)) return e;
  if (int e = linear(x.shared_gate, in, m, nullptr, s.shares, s, threads)) return e;
  const int team = m * kHidden < (1 << 15) ? 1 : threads;
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t t = 0; t < m; ++t)
    add_row(s.hidden + t * kHidden, s.given + t * kHidden, 1.0f / (1.0f + lb_exp(-s.shares[t])));
  return 0;
}

static int mixture(const Mixture& x, const State& s, int64_t layer, const float* in, int64_t m, int threads) {
  if (int e = linear(x.router, in, m, nullptr, s.odds, s, threads)) return e;
  int32_t* chosen = chosen_of(s, layer);
  const int team = m * x.count * x.active < (1 << 13) ? 1 : threads;
#pragma omp parallel for num_threads(team) schedule(static)
  for (int64_t t = 0; t < m; ++t)
    choose(x, s.odds + t * x.count, chosen + t * x.active, s.shares + t * x.active);
  sort_places(x, s, chosen, m);
  int32_t first = 0;
  for (int64_t n = 0; n < x.count; ++n) {
    const int32_t end = s.ends[n];
    if (end > first)
      if (int e = expert(x, x.experts[n], s, in, s.places + first, end - first, m, threads)) return e;
    first = end;
  }
  return x.shared.down.n ? shared_expert(x, s, in, m, threads) : 0;
}
