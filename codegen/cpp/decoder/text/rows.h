// Row operations between the linear kernels: sums, norms, activations, rotary positions.
// y = x / rms(x) * w. In place when y is x.
static void rms_norm(const float* x, const float* w, float* y, int64_t n) {
  F a = fzero(), b = fzero();
  int64_t i = 0;
  for (; i + 32 <= n; i += 32) {
    const F u = fload(x + i), v = fload(x + i + 16);
    a = fma_(u, u, a), b = fma_(v, v, b);
  }
  float sum = fsum(fadd(a, b));
  for (; i < n; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / sqrtf(sum / float(n) + kEps);
  const F s = fset1(scale);
  for (i = 0; i + 16 <= n; i += 16) fstore(y + i, fmul(fmul(fload(x + i), s), fload(w + i)));
  for (; i < n; ++i) y[i] = x[i] * scale * w[i];
}

// The first 2 * kRotary entries of a head are rotated as pairs (i, i + kRotary).
static void rotate(float* x, const float* cosine, const float* sine) {
  for (int64_t i = 0; i < kRotary; ++i) {
    const float a = x[i], b = x[i + kRotary];
    x[i] = a * cosine[i] - b * sine[i];
    x[i + kRotary] = b * cosine[i] + a * sine[i];
  }
}

// The tanh form of gelu: x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 x**3)).
LB_INLINE float gelu_tanh(float x) {
  const float inner = 1.5957691216057308f * (x + 0.044715f * x * x * x);
  const float y = x / (1.0f + lb_exp(-inner));
  return x == x ? y : x;
}

// gate = act(gate) * up
static void gated(const float* gate, const float* up, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = LB_ACTIVATION(gate[i]) * up[i];
}

// to += from * scale
LB_INLINE void add_row(float* to, const float* from, float scale) {
  for (int64_t i = 0; i < kHidden; ++i) to[i] += from[i] * scale;
}

LB_INLINE double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}
