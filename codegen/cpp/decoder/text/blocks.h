// Parts of a block, for `m` tokens.
static int linear(const Linear& l, const float* x, int64_t m, const float* residual, float* out, const State& s,
                  int threads) {
  if (!l.kernel) {
    const auto run = l.type == kF16 ? dense<uint16_t> : l.type == kBf16 ? dense<Bf16> : dense<float>;
    run(l, x, m, residual, out, threads);
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
    if (kWideNorms) {
      rms_norm(q + t * stride[0], l.query_norm, q + t * stride[0], kQ);
      rms_norm(k + t * stride[1], l.key_norm, k + t * stride[1], kKv);
    }
    for (int64_t h = 0; h < kHeads + kKvHeads; ++h) {
      const bool key = h >= kHeads;
      float* x = key ? k + t * stride[1] + (h - kHeads) * kHeadDim : q + t * stride[0] + h * kHeadDim;
      const float* w = key ? l.key_norm : l.query_norm;
      if (w && !kWideNorms) rms_norm(x, w, x, kHeadDim);
      rotate(x, cosine, sine);
      if (!key) for (int64_t i = 0; i < kHeadDim; ++i) x[i] *= kScale;
    }
#if !LB_PACKED
    for (int64_t h = 0; h < kKvHeads; ++h)
      store_kv(s, layer, h, at + t, k + t * stride[1] + h * kHeadDim, v + t * stride[2] + h * kHeadDim);
#endif
  }
}

static int feed_forward(const Gated& g, const State& s, const float* x, int64_t m, const float* residual, float* out,
                        int threads) {
  float* inner = s.inner;
  const int64_t width = g.down.k;
  if (int e = linear(g.gate, x, m, nullptr, inner, s, threads)) return e;
  if (g.gate.n == width * 2 || g.up.n) {
    // Gate and up side by side in a row, or two matrices one after the other.
    const bool rows = !g.up.n;
    float* up = rows ? inner + width : inner + m * width;
    if (!rows) if (int e = linear(g.up, x, m, nullptr, up, s, threads)) return e;
    float* product = inner + 2 * m * width;
    const int team = m * width < (1 << 15) ? 1 : threads;
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t t = 0; t < m; ++t)
      gated(inner + t * (rows ? 2 : 1) * width, up + t * (rows ? 2 : 1) * width, product + t * width, width);
    inner = product;
  }
  return linear(g.down, inner, m, residual, out, s, threads);
}

