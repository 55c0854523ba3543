// The kernel: thread block i takes an equal share of the line of units; its groups of warps take turns.

struct Share {
  int blocks;

  LB_DEV int start(int block) const { return (int)((unsigned)T::UNITS * (unsigned)block / (unsigned)blocks); }
  LB_DEV int owner(int unit) const { return (int)(((unsigned)(unit + 1) * (unsigned)blocks - 1) / (unsigned)T::UNITS); }
};

struct Block {
  const Args& a;
  unsigned char* shared;
  Share share;
  int thread, first_token;

  LB_DEV float* sums() const { return (float*)(shared + T::GROUPS_OF_WARPS * T::STAGES * STAGE); }
  LB_DEV unsigned char* zeros() const { return (unsigned char*)(sums() + T::GROUPS_OF_WARPS * T::TILE_M * T::REDUCE_STRIDE); }
  LB_DEV uint64_t* barriers() const { return (uint64_t*)(zeros() + 128); }
  LB_DEV int* last() const { return (int*)(barriers() + T::GROUPS_OF_WARPS * T::STAGES); }
  LB_DEV uint16_t* table() const { return (uint16_t*)(zeros() + 128 + T::BARRIER_BYTES); }

  LB_DEV void prepare() const {
    if (thread < 32) ((uint32_t*)zeros())[thread] = 0;
    for (int i = thread; i < T::TABLE_SIZE; i += T::WARPS * 32) table()[i] = TABLE[i];
    if (T::BULK && thread < T::GROUPS_OF_WARPS * T::STAGES) barrier_init(barriers() + thread);
    if (T::BULK) barriers_ready();
    block_sync();
  }

  // A lane's sums to where those of all groups of warps meet: [group][token][row].
  LB_DEV void leave(const Sums& y) const {
    const int warp = thread / 32, lane = thread % 32, group = warp / T::ROW_WARPS, first = warp % T::ROW_WARPS * PARTS;
#pragma unroll
    for (int m = 0; m < PARTS; ++m)
#pragma unroll
      for (int t = 0; t < TT; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = t * 8 + lane % 4 * 2 + i % 2, row = (first + m) * 16 + i / 2 * 8 + lane / 4;
          if (T::TILE_M % 8 == 0 || token < T::TILE_M)
            sums()[(group * T::TILE_M + token) * T::REDUCE_STRIDE + row] = y[m][t][i];
        }
  }

  LB_DEV float total(int token, int row) const {
    float v = 0.0f;
#pragma unroll
    for (int group = 0; group < T::GROUPS_OF_WARPS; ++group)
      v += sums()[(group * T::TILE_M + token) * T::REDUCE_STRIDE + row];
    return v;
  }

  // Partial sums of a set of tiles by thread block `block`: the first set it worked on, or another (then its last).
  LB_DEV float* part(int block, int set) const {
    const int which = share.start(block) / T::UNITS_PER_SET == set ? 0 : 1;
    return a.part + ((size_t)(blockIdx.y * share.blocks + block) * 2 + which) * T::TILE_M * ROWS;
  }

  // All warps have left their sums of units begin..end of a set: finish the set, or add to the work of others. Whoever
  // comes last adds all parts up, always in the same order.
  LB_DEV void conclude(int set, int begin, int end, int block) const {
    const bool whole = begin == set * T::UNITS_PER_SET && end == (set + 1) * T::UNITS_PER_SET;
    if (!whole) {
      float* mine = part(block, set);
      for (int i = thread; i < T::TILE_M * ROWS; i += T::WARPS * 32)
        if (first_token + i / ROWS < a.tokens) mine[i] = total(i / ROWS, i % ROWS);
      const int from = share.owner(set * T::UNITS_PER_SET), to = share.owner((set + 1) * T::UNITS_PER_SET - 1);
      fence();
      block_sync();
      int* counter = a.count + blockIdx.y * T::TILE_SETS + set;
      if (thread == 0) {
        *last() = arrive(counter) == to - from;
        if (*last()) *counter = 0;  // for the next launch
      }
      block_sync();
      if (!*last()) return;
      fence();
      for (int i = thread; i < T::TILE_M * OUT_ROWS; i += T::WARPS * 32) {
        const int token = first_token + i / OUT_ROWS, at = i / OUT_ROWS * ROWS + i % OUT_ROWS;
        if (token >= a.tokens) break;
        float v = 0.0f, up = 0.0f;
        for (int other = from; other <= to; ++other) {
          const float* p = part(other, set) + at;
          v += load_fresh(p);
          if (T::GATED) up += load_fresh(p + 64);
        }
        finish(a, set, i % OUT_ROWS, token, v, up);
      }
      return;
    }
    for (int i = thread; i < T::TILE_M * OUT_ROWS; i += T::WARPS * 32) {
      const int token = i / OUT_ROWS, row = i % OUT_ROWS;
      if (first_token + token >= a.tokens) break;
      finish(a, set, row, first_token + token, total(token, row), T::GATED ? total(token, row + 64) : 0.0f);
    }
  }

  static constexpr int OUT_ROWS = T::GATED ? 64 : ROWS;
};

LB_DEV void stream(const Args& a) {
  const Share share = {(int)gridDim.x};
  const Block block = {a, shared_memory(), share, (int)threadIdx.x, (int)blockIdx.y * T::TILE_M};
  const int warp = block.thread / 32, lane = block.thread % 32;
  const int group = warp / T::ROW_WARPS, first_part = warp % T::ROW_WARPS * PARTS;
  const int start = share.start(blockIdx.x), end = share.start(blockIdx.x + 1);
  const Ring ring = {block.shared + group * T::STAGES * STAGE, block.barriers() + group * T::STAGES, stream_policy(),
                     block.thread % (T::ROW_WARPS * 32), group};
  block.prepare();

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
  // The stage of the next unit, once it is there. What was read last (or, in products of warpgroups, the one before, for
  // the last may still be read) is filled anew.
  const auto next = [&](int current) {
    const unsigned char* stage = ring.stage + slot * STAGE;
    ring.wait(slot, parity);
    const int ahead = current + T::AHEAD * T::GROUPS_OF_WARPS, free = (slot + T::AHEAD) % T::STAGES;
    if (ahead < end) {
      ring.request_weights(a, free, ahead / T::UNITS_PER_SET, ahead % T::UNITS_PER_SET);
      ring.request_x(a, free, ahead % T::UNITS_PER_SET, block.first_token);
    }
    copies_commit();
    if (++slot == T::STAGES) slot = 0, parity ^= 1;
    return stage;
  };
  for (int begin = start; begin < end;) {
    const int set = begin / T::UNITS_PER_SET, set_end = (set + 1) * T::UNITS_PER_SET, stop = end < set_end ? end : set_end;
    Sums y = {};
#ifdef LB_WARPGROUP
    multiply_set(y, unit, stop, block.table(), first_part, lane, next);
    unit = stop;
#else
    for (; unit < stop; unit += T::GROUPS_OF_WARPS)
      multiply_unit(y, next(unit), block.zeros(), block.table(), first_part, lane);
#endif
    block.leave(y);
    block_sync();
    block.conclude(set, begin, stop, blockIdx.x);
    block_sync();
    begin = stop;
  }
}
