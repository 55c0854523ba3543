// Activations that another kernel has rounded: see `codegen/rounded.py`.

#if LB_ROWS_IN
// Arrive once the copies of this thread are there; the barrier counts that as one who comes.
#ifdef LB_HOST
LB_DEV void copies_arrive(uint64_t* barrier) {
  std::vector<host::Copy>& mine = host::current->copies;
  std::vector<host::Copy>& all = host::barriers[barrier].copies;
  all.insert(all.end(), mine.begin(), mine.end());
  mine.clear();
  barrier_arrive(barrier);
}
#else
LB_DEV void copies_arrive(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
#endif

#endif
// The scale of a token's group: at the end of its row, or known beforehand.
LB_DEV const float* row_scale(const Args& a, int token, int group) {
  if constexpr (T::STATIC_X) return a.input_scale + group;
  return (const float*)((const char*)a.x + (size_t)token * T::X_ROW + T::X_SCALES) + group;
}

#if LB_ROWS_COPIED
// The level of a column: an int8, or e4m3.
LB_DEV float row_level(const Args& a, size_t token, int column) {
  const uint32_t byte = ((const unsigned char*)a.x)[token * T::X_ROW + byte_of(column)];
  if constexpr (T::X_MANTISSA < 0) return (float)(signed char)byte;
  return half_float((uint16_t)((byte & 0x80) << 8 | (byte & 0x7f) << 7)) * 256.0f;
}
#endif
