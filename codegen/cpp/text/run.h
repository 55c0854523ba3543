// The entry point: prepare the activations, then every thread runs its share of the work.
extern "C" __attribute__((visibility("default"))) int lb_run(const void* x, int64_t m, const uint8_t* plane0,
                                                             const uint8_t* plane1, const uint8_t* plane2,
                                                             const void* scale, const uint8_t* zero, const float* bias,
                                                             const void* residual, void* out, void* scratch,
                                                             int64_t scratch_bytes, int threads) {
  if (m <= 0) return 0;
  // Waking other threads costs about as much as 2**17 products.
  if (threads < 1 || kProducts * m < (1 << 17)) threads = 1;
  if (scratch_bytes < kTokenBytes * m + kThreadBytes * threads + 256) return 1;
  uint8_t* at = (uint8_t*)((uintptr_t(scratch) + 63) & ~uintptr_t(63));
  Args a = {{plane0, plane1, plane2}, scale, zero, bias, residual, out, m, at, nullptr, nullptr};
  uint8_t* const rooms = at;
  at += kThreadBytes * threads;
  a.xq = at;
  at += kChunks * m * kTokenStride * int64_t(sizeof(XQ));
  a.xs = (float*)at;
  a.xi = (int32_t*)(at + kChunks * m * 4);
  const auto load = [&](int part, int parts, uint8_t* room) {
    load_tokens((const XT*)x, m * part / parts, m * (part + 1) / parts, m, (float*)room, (void*)a.xq, (float*)a.xs,
                (int32_t*)a.xi);
  };
  if (threads == 1) {
    load(0, 1, rooms);
    work(a, 0, 1, rooms + kRowBytes);
    return 0;
  }
  // With fewer tokens than threads a barrier costs more than the parallel part saves.
  const bool early = m < threads;
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
