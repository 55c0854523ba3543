// Entry points. `state`: the cache's tensors, keys then values: plane, scale, minimum, window (null where there is
// none). `n`: batch, heads, rows of a key-value head, query tokens, length, stored keys, stored values, capacity, rows of
// the key and of the value window, mask stride of a sequence and of a query, splits, threads.
extern "C" __attribute__((visibility("default"))) int lb_attend(const float* q, const void* const* state,
                                                                const uint8_t* mask, float scale, float* partial,
                                                                float* out, const int64_t* n) {
  Args g;
  g.q = q, g.mask = mask, g.partial = partial, g.out = out, g.scale = scale;
  g.k_plane = (const uint8_t*)state[0], g.v_plane = (const uint8_t*)state[4];
  g.k_scale = (const uint16_t*)state[1], g.v_scale = (const uint16_t*)state[5];
  g.k_minimum = (const uint16_t*)state[2], g.v_minimum = (const uint16_t*)state[6];
  g.k_window = (const Window*)state[3], g.v_window = (const Window*)state[7];
  g.heads = n[1], g.rows = n[2], g.queries = n[3], g.length = n[4], g.k_stored = n[5], g.v_stored = n[6];
  g.capacity = n[7], g.k_rows = n[8], g.v_rows = n[9], g.mask_batch = n[10], g.mask_query = n[11], g.splits = n[12];
  if (g.length > g.capacity + (g.k_rows < g.v_rows ? g.k_rows : g.v_rows) || g.splits < 1) return 1;
  run(g, n[0] * n[1], int(n[13]));
  return 0;
}

// Keys and values [batch x heads][tokens][kDim] behind the first `length` tokens. `n`: batch x heads, tokens, length,
// capacity, rows of the key and of the value window, threads.
extern "C" __attribute__((visibility("default"))) int lb_append(const float* k, const float* v, void* const* state,
                                                                const int64_t* n) {
  const int64_t heads = n[0], tokens = n[1], length = n[2], capacity = n[3];
#pragma omp parallel for num_threads(int(n[6])) if (n[6] > 1 && heads * tokens > 64)
  for (int64_t h = 0; h < heads; ++h) {
    append_side<Keys>(side_of(state, 0, h, capacity, n[4]), k + h * tokens * kDim, kDim, tokens, length);
    append_side<Values>(side_of(state, 4, h, capacity, n[5]), v + h * tokens * kDim, kDim, tokens, length);
  }
  return 0;
}
