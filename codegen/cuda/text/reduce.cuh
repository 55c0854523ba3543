// Work cut into equal shares for thread blocks, and how sums of warps, and of blocks that share a tile, meet.

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

  LB_DEV float* sums() const { return (float*)(shared + T::RING_BYTES); }
  LB_DEV unsigned char* zeros() const { return (unsigned char*)(sums() + T::GROUPS_OF_WARPS * T::TILE_M * T::REDUCE_STRIDE); }
  LB_DEV uint64_t* barriers() const { return (uint64_t*)(zeros() + 128); }
  LB_DEV int* last() const { return (int*)(barriers() + T::GROUPS_OF_WARPS * T::STAGES); }
  LB_DEV uint16_t* table() const { return (uint16_t*)(zeros() + 128 + T::BARRIER_BYTES); }

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
#if LB_ROWS_OUT
      write_rows<OUT_ROWS>(a, set, first_token, T::TILE_M, thread, T::WARPS * 32, [&](int token, int row) {
        float v = 0.0f;
        for (int other = from; other <= to; ++other) v += load_fresh(part(other, set) + token * ROWS + row);
        return v;
      });
      return;
    }
    write_rows<OUT_ROWS>(a, set, first_token, T::TILE_M, thread, T::WARPS * 32,
                         [&](int token, int row) { return total(token, row); });
#else
      for (int i = thread; i < T::TILE_M * OUT_ROWS; i += T::WARPS * 32) {
        const int token = first_token + i / OUT_ROWS, at = i / OUT_ROWS * ROWS + i % OUT_ROWS;
        if (token >= a.tokens) break;
        float v = 0.0f, up = 0.0f;
        for (int other = from; other <= to; ++other) {
          const float* p = part(other, set) + at;
          v += load_fresh(p);
          if (T::GATED) up += load_fresh(p + T::TILE_ROWS);
        }
        finish(a, set, i % OUT_ROWS, token, v, up);
      }
      return;
    }
    for (int i = thread; i < T::TILE_M * OUT_ROWS; i += T::WARPS * 32) {
      const int token = i / OUT_ROWS, row = i % OUT_ROWS;
      if (first_token + token >= a.tokens) break;
      finish(a, set, row, first_token + token, total(token, row), T::GATED ? total(token, row + T::TILE_ROWS) : 0.0f);
    }
#endif
  }

  static constexpr int OUT_ROWS = T::GATED ? T::TILE_ROWS : ROWS;
};
