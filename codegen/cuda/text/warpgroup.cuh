// Products of four warps at once (wgmma, Hopper): weights from registers, activations from shared memory.
//
// A warp of the four holds 16 rows of a tile, in the registers that `mma` takes, and the activations of a stage lie as
// the instruction wants them: rows of 128 bytes, pieces exchanged as `swizzle` does. While a unit is multiplied the next
// one is decoded.

// The activations of a step of 16 columns: where, 1024 bytes from eight rows to the next eight, 128-byte swizzle.
LB_DEV uint64_t describe_x(const unsigned char* stage, int step) {
  const uint64_t at = shared_address(stage + X_AT + step * 32) >> 4 & 0x3fff;
  return at | (uint64_t)1 << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62;
}

// One unit as left operands.
LB_DEV void decode_unit(uint32_t (&a)[4][4], Sides& sides, const unsigned char* stage, const uint16_t* table,
                        int first_part, int lane) {
  Words words;
  words.load(stage, first_part, 0, lane);
  if constexpr (T::IN_LOOP) sides.load(stage, first_part, 0, lane);
  decode(a, words.w0, words.w1, words.w2, table);
  if constexpr (T::ZERO || T::addend(0) != 0.0f || T::addend(1) != 0.0f)
#pragma unroll
    for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = fma16(a[i / 4][i % 4], T::ONES, pair16(sides.addend(0, i % 2)));
}

// The units `unit` to `stop` of a set. `next` waits for a unit's stage and asks for a later one.
template <class Next>
LB_DEV void multiply_set(Sums& y, int unit, int stop, const uint16_t* table, int first_part, int lane, Next next) {
  static_assert(PARTS == 1 && T::UNIT_BLOCKS == 1 && T::FLUSHES == 1 && !T::SUMS_X, "what a warpgroup can do");
  if (unit >= stop) return;
  const unsigned char* stage = next(unit);
  uint32_t a[4][4], ahead[4][4];
  Sides sides, ahead_sides;
  Sums sum = {};
  float x_sum[TT][4];  // not used
  decode_unit(a, sides, stage, table, first_part, lane);
  while (true) {
    warpgroup_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step)
      wgmma(T::DIRECT ? y[0] : sum[0], a[step], describe_x(stage, step), T::DIRECT || step > 0);
    warpgroup_commit();
    if (++unit < stop) {
      stage = next(unit);
      decode_unit(ahead, ahead_sides, stage, table, first_part, lane);
    }
    warpgroup_wait(T::DIRECT ? y[0] : sum[0]);
    if constexpr (!T::DIRECT) flush(y, sum, x_sum, sides);
    if (unit >= stop) return;
#pragma unroll
    for (int i = 0; i < 16; ++i) a[i / 4][i % 4] = ahead[i / 4][i % 4];
    sides = ahead_sides;
  }
}
