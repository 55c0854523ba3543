// The entry point: prepare codebooks and activations, then every thread runs its share of the work.
extern "C" __attribute__((visibility("default"))) int lb_run(const void* x, int64_t m, const void* const* weight,
                                                             const float* bias, const void* residual, void* out,
                                                             void* scratch, int64_t scratch_bytes, int threads) {
  if (m <= 0) return 0;
  // Waking other threads costs about as much as 2**17 products.
  if (threads < 1 || kProducts * m < (1 << 17)) threads = 1;
  if (scratch_bytes < kSharedBytes + kTokenBytes * m + kThreadBytes * threads + 256) return 1;
  uint8_t* const shared = (uint8_t*)((uintptr_t(scratch) + 63) & ~uintptr_t(63));
  uint8_t* const rooms = shared + kSharedBytes;
  Args a;
  a.bias = bias, a.residual = residual, a.out = out, a.m = m;
  a.bind(weight, shared, rooms + kThreadBytes * threads);
  const auto load = [&](int part, int parts, uint8_t* room) {
    prepare(a, part, parts);
    load_tokens(a, (const XT*)x, m * part / parts, m * (part + 1) / parts, (float*)room);
  };
  if (threads == 1) {
    load(0, 1, rooms);
    work(a, 0, 1, rooms + kRowBytes);
    return 0;
  }
  // With fewer tokens than threads a barrier costs more than the parallel part saves, unless codebooks are large.
  const bool early = m < threads && kSharedBytes < (1 << 16);
  if (early) load(0, 1, rooms);
#pragma omp parallel num_threads(threads)
  {
    const int part = omp_get_thread_num(), parts = omp_get_num_threads();
    uint8_t* room = rooms + kThreadBytes * part;
    if (!early) {
      load(part, parts, room);
#pragma omp barrier
    }
    work(a, part, parts, room + kRowBytes);
  }
  return 0;
}
