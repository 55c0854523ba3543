// The kernel: thread block i takes an equal share of the line of units; its groups of warps take turns.

LB_DEV void prepare_block(const Block& b) {
  if (b.thread < 32) ((uint32_t*)b.zeros())[b.thread] = 0;
  for (int i = b.thread; i < T::TABLE_SIZE; i += T::WARPS * 32) b.table()[i] = TABLE[i];
  if (T::BULK && b.thread < T::GROUPS_OF_WARPS * T::STAGES) barrier_init(b.barriers() + b.thread, 1);
  if (T::BULK) barriers_ready();
  block_sync();
}

// A lane's sums to where those of all groups of warps meet: [group][token][row].
LB_DEV void leave(const Block& b, const Totals& y) {
  const int warp = b.thread / 32, lane = b.thread % 32, group = warp / T::ROW_WARPS, first = warp % T::ROW_WARPS * PARTS;
#pragma unroll
  for (int m = 0; m < PARTS; ++m)
#pragma unroll
    for (int t = 0; t < TT; ++t)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = t * 8 + lane % 4 * 2 + i % 2, row = (first + m) * 16 + i / 2 * 8 + lane / 4;
        if (T::TILE_M % 8 == 0 || token < T::TILE_M)
          b.sums()[(group * T::TILE_M + token) * T::REDUCE_STRIDE + row] = (float)y[m][t][i];
      }
}

LB_DEV void stream(const Args& a) {
  const Share share = {(int)gridDim.x};
  const Block block = {a, shared_memory(), share, (int)threadIdx.x, (int)blockIdx.y * T::TILE_M};
  const int warp = block.thread / 32, lane = block.thread % 32;
  const int group = warp / T::ROW_WARPS, first_part = warp % T::ROW_WARPS * PARTS;
  const int start = share.start(blockIdx.x), end = share.start(blockIdx.x + 1);
  const Ring ring = {block.shared + group * T::STAGES * STAGE, block.barriers() + group * T::STAGES, stream_policy(),
                     block.thread % (T::ROW_WARPS * 32), group};
  prepare_block(block);

  // Weights do not depend on the kernel before: bulk copies ask for them while it still runs.
  for (int s = 0; s < T::AHEAD && T::BULK; ++s) {
    const int unit = start + group + s * T::GROUPS_OF_WARPS;
    if (unit < end) ring.request_weights(a, s, unit / T::UNITS_PER_SET, unit % T::UNITS_PER_SET);
  }
  wait_for_inputs();
  for (int s = 0; s < T::AHEAD; ++s) {
    const int unit = start + group + s * T::GROUPS_OF_WARPS;
    if (unit < end && !T::BULK) ring.request_weights(a, s, unit / T::UNITS_PER_SET, unit % T::UNITS_PER_SET);
    if (unit < end) ring.request_x(a, s, unit % T::UNITS_PER_SET, block.first_token);
    copies_commit();
  }
  let_next_start();

  int unit = start + group, slot = 0;
  uint32_t parity = 0;
  // The stage of the next unit, once it is there. What was read last is filled anew.
  const auto next = [&](int current) {
    const unsigned char* stage = ring.stage + slot * STAGE;
    ring.wait(slot, parity);
    const int ahead = current + T::AHEAD * T::GROUPS_OF_WARPS, free = quotient(slot + T::AHEAD, T::STAGES).rest;
    if (ahead < end) {
      const Quotient at = quotient(ahead, T::UNITS_PER_SET);
      ring.request_weights(a, free, at.whole, at.rest);
      ring.request_x(a, free, at.rest, block.first_token);
    }
    copies_commit();
    if (++slot == T::STAGES) slot = 0, parity ^= 1;
    return stage;
  };
  for (int begin = start; begin < end;) {
    const int set = begin / T::UNITS_PER_SET, set_end = (set + 1) * T::UNITS_PER_SET, stop = end < set_end ? end : set_end;
    Totals y = {};
    for (; unit < stop; unit += T::GROUPS_OF_WARPS)
      multiply_unit(y, next(unit), block.zeros(), block.table(), first_part, lane);
    leave(block, y);
    block_sync();
    block.conclude(set, begin, stop, blockIdx.x);
    block_sync();
    begin = stop;
  }
}
