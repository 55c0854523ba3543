// Many tokens on Hopper: one warp fetches, warpgroups multiply (wgmma), weights from registers, activations from shared
// memory.
//
// A tile of the output is a set of row tiles by TILE_M tokens, and its work the units along the columns. Every thread
// block first takes whole tiles, wave by wave; what is left of the last waves is one line of units, cut into equal shares
// (`codegen/streamk.py`), so that all blocks end together. FIXED: every tile is cut into SPLIT shares instead, whatever the
// number of tokens, so that its sums always add up in one order. A warp of a warpgroup holds 16 rows of a tile, in the registers
// that `mma` takes. While a unit is multiplied the next one is decoded.

constexpr int BAND = 16;  // token tiles that share weights in the second-level cache
constexpr int ROLES = T::WARPS * 32;  // threads that multiply
constexpr int CHUNK = T::TILE_M < 32 ? T::TILE_M : 32;
constexpr int CHUNK_TILES = CHUNK / 8;

struct Piece {
  int set, token_block, begin, end;  // units
  int rest;                          // the tile, counted from the first that is shared; negative: all of it is one block's
  int share;                         // of a tile with a fixed number of them
};

struct Line {
  int blocks, token_blocks, tiles, waves, units;

  LB_DEV Line(int blocks, int token_blocks) : blocks(blocks), token_blocks(token_blocks) {
    tiles = token_blocks * T::TILE_SETS;
    waves = tiles % blocks ? (tiles / blocks > 1 ? tiles / blocks - 1 : 0) : tiles / blocks;
    units = (tiles - waves * blocks) * T::UNITS_PER_SET;
  }
  LB_DEV int start(int block) const { return (int)((unsigned)units * (unsigned)block / (unsigned)blocks); }
  LB_DEV int owner(int unit) const { return (int)(((unsigned)(unit + 1) * (unsigned)blocks - 1) / (unsigned)units); }

  LB_DEV Piece piece(int tile, int begin, int end, int rest) const {
    const int band = tile / (BAND * T::TILE_SETS), first = band * BAND, inside = tile - first * T::TILE_SETS;
    const int height = token_blocks - first < BAND ? token_blocks - first : BAND;
    return {inside / height, first + inside % height, begin, end, rest, 0};
  }
  LB_DEV Piece share_of(int i) const {
    const int tile = i / T::SPLIT, share = i % T::SPLIT;
    Piece p = piece(tile, T::UNITS_PER_SET * share / T::SPLIT, T::UNITS_PER_SET * (share + 1) / T::SPLIT,
                    T::SPLIT > 1 ? tile : -1);
    p.share = share;
    return p;
  }
};

// The pieces of one thread block, in order.
struct Pieces {
  const Line& line;
  int block, wave, at, end;

  LB_DEV Pieces(const Line& line, int block)
      : line(line), block(block), wave(0), at(line.start(block)), end(line.start(block + 1)) {}
  LB_DEV bool more() const {
    if constexpr (T::FIXED) return wave * line.blocks + block < line.tiles * T::SPLIT;
    return wave < line.waves || at < end;
  }
  LB_DEV Piece next() {
    if constexpr (T::FIXED) return line.share_of(wave++ * line.blocks + block);
    if (wave < line.waves) return line.piece(wave++ * line.blocks + block, 0, T::UNITS_PER_SET, -1);
    const int rest = at / T::UNITS_PER_SET, first = rest * T::UNITS_PER_SET, begin = at - first;
    at = first + T::UNITS_PER_SET < end ? first + T::UNITS_PER_SET : end;
    const bool whole = begin == 0 && at == first + T::UNITS_PER_SET;
    return line.piece(line.waves * line.blocks + rest, begin, at - first, whole ? -1 : rest);
  }
};

struct Slot {
  int slot = 0;
  uint32_t parity = 0;

  LB_DEV void advance() {
    if (++slot == T::STAGES) slot = 0, parity ^= 1;
  }
};

struct Pipeline {
  const Args& a;
  unsigned char* shared;
  const Line& line;

  LB_DEV float* sums() const { return (float*)(shared + T::STAGES * STAGE); }
  LB_DEV uint64_t* full() const { return (uint64_t*)(sums() + CHUNK * T::REDUCE_STRIDE + 32); }
  LB_DEV uint64_t* empty() const { return full() + T::STAGES; }
  LB_DEV int* last() const { return (int*)(empty() + T::STAGES); }
  LB_DEV uint16_t* table() const { return (uint16_t*)((unsigned char*)full() + T::BARRIER_BYTES); }

  LB_DEV void prepare_block() const {
    for (int i = threadIdx.x; i < T::TABLE_SIZE; i += ROLES) table()[i] = TABLE[i];
    if (threadIdx.x < T::STAGES) {
#if LB_ROWS_IN
      barrier_init(full() + threadIdx.x, T::GROUP_X ? 33 : 1);  // the lanes that copy scales arrive too
#else
      barrier_init(full() + threadIdx.x, 1);
#endif
      barrier_init(empty() + threadIdx.x, T::WARPS);
    }
    barriers_ready();
    block_sync();
  }

  // One thread asks for everything.
  LB_DEV void fetch() const {
    const Ring ring = {shared, full(), stream_policy(), 0, 0};
    Slot at;
    wait_for_inputs();
    for (Pieces pieces(line, blockIdx.x); pieces.more();) {
      const Piece p = pieces.next();
      for (int u = p.begin; u < p.end; ++u, at.advance()) {
        unsigned char* stage = shared + at.slot * STAGE;
        barrier_wait(empty() + at.slot, at.parity ^ 1);
#if LB_ROWS_IN
        barrier_expect(full() + at.slot, WEIGHT_BYTES + T::TILE_M * X_STRIDE);
        ring.weights<true>(a, stage, at.slot, p.set, u);
#else
        barrier_expect(full() + at.slot, WEIGHT_BYTES + X_SCALE_BYTES + T::TILE_M * X_STRIDE);
        ring.weights<true>(a, stage, at.slot, p.set, u);
        if constexpr (T::GROUP_X)
          copy_bulk(stage + X_SCALE_AT, scales_of(a, p.token_block, u), X_SCALE_BYTES, full() + at.slot, ring.policy);
#endif
        copy_tensor(stage + X_AT, &a.map, u * T::UNIT_BLOCKS * 64, p.token_block * T::TILE_M, full() + at.slot);
      }
    }
    let_next_start();
  }

#if LB_ROWS_IN
  // One warp asks for scales, which lie in rows far from each other.
  LB_DEV void fetch_scales(int lane) const {
    Slot at;
    wait_for_inputs();
    for (Pieces pieces(line, blockIdx.x); pieces.more();) {
      const Piece p = pieces.next();
      for (int u = p.begin; u < p.end; ++u, at.advance()) {
        barrier_wait(empty() + at.slot, at.parity ^ 1);
        const uint32_t to = shared_address(shared + at.slot * STAGE) + X_SCALE_AT;
        request_scales<32>(a, to, lane, u, p.token_block * T::TILE_M);
        copies_arrive(full() + at.slot);
      }
    }
    copies_commit();
    copies_wait<0>();
  }

#endif
  // The activations of a matrix instruction: 1024 bytes from eight rows to the next eight, 128-byte swizzle.
  LB_DEV uint64_t describe_x(int slot, int step) const {
    const uint64_t at = shared_address(shared + slot * STAGE + X_AT + step * 32) >> 4 & 0x3fff;
    return at | (uint64_t)1 << 16 | (uint64_t)64 << 32 | (uint64_t)1 << 62;
  }

  // A unit's weights of this warp as left operands: four instructions deep.
  LB_DEV void decode_unit(uint32_t (&operand)[4][4], Sides (&sides)[T::FLUSHES], int slot, int part, int lane) const {
    const unsigned char* stage = shared + slot * STAGE;
    if constexpr (T::IN_LOOP) {
#pragma unroll
      for (int j = 0; j < T::FLUSHES; ++j) sides[j].load(stage, part, j, lane);
    }
#pragma unroll
    for (int b = 0; b < T::UNIT_BLOCKS; ++b) {
      Words words;
      uint32_t block[STEPS][4];
      words.load(stage, part, b, lane);
      decode(block, words.w0, words.w1, words.w2, table());
#pragma unroll
      for (int i = 0; i < STEPS * 4; ++i) {
        const int step = b * STEPS + i / 4;
        operand[step][i % 4] = shifted(block[i / 4][i % 4], sides[step * 256 / T::BITS / T::FLUSH], 0, i % 2);
      }
    }
  }

  // A unit's weights as left operands, with what flushing its sums takes.
  struct Unit {
    uint32_t operand[4][4];
    Sides sides[T::FLUSHES];
  };

  // Unit `u` of a piece, while the weights of the next one are decoded into `ahead`. The stage that is read is given back
  // once its product is done.
  LB_DEV void multiply_unit(Totals& y, Sums& sum, bool& add, Unit& unit, Unit& ahead, const Piece& p, int u, Slot& at,
                            int part, int lane) const {
    constexpr int PER = 4 / T::FLUSHES;
    Raw x_sum[TT][4], w_sum[1][4];  // not used
    const int slot = at.slot;
    const bool ends = T::FLUSHES > 1 || u + 1 == p.end || (u + 1) % T::UNITS_PER_FLUSH == 0;
    at.advance();
#pragma unroll
    for (int j = 0; j < T::FLUSHES; ++j) {
      auto& into = Pick<T::DIRECT>::of(y[0], sum[0]);
      warpgroup_fence();
#pragma unroll
      for (int step = j * PER; step < (j + 1) * PER; ++step)
        wgmma(into, unit.operand[step], describe_x(slot, step), T::DIRECT || add || step > j * PER);
      warpgroup_commit();
      if (j == T::FLUSHES - 1 && u + 1 < p.end) {
        barrier_wait(full() + at.slot, at.parity);
        decode_unit(ahead.operand, ahead.sides, at.slot, part, lane);
      }
      warpgroup_wait(into);
      warpgroup_used(unit.operand);
      if constexpr (!T::DIRECT) {
        if (ends) flush<false>(y, sum, x_sum, w_sum, unit.sides[j], x_scales(shared + slot * STAGE, j), lane);
      }
      add = !ends;
    }
    if (lane == 0) barrier_arrive(empty() + slot);
  }

  // All units of a piece, two a turn: with one, every operand would be copied. Groups may go over several units.
  LB_DEV void multiply(Totals& y, const Piece& p, Slot& at, int part, int lane) const {
    static_assert(PARTS == 1 && !T::SUMS_X && T::UNIT_BLOCKS * STEPS == 4, "what a warpgroup can do");
    Unit one, other;
    Sums sum = {};
    barrier_wait(full() + at.slot, at.parity);
    decode_unit(one.operand, one.sides, at.slot, part, lane);
    bool add = false;
    for (int u = p.begin; u < p.end; u += 2) {
      multiply_unit(y, sum, add, one, other, p, u, at, part, lane);
      if (u + 1 < p.end) multiply_unit(y, sum, add, other, one, p, u + 1, at, part, lane);
    }
  }

  // Partial sums of a shared tile by thread block `block`, whose line has at most two of them; or of its share `block`.
  LB_DEV float* partial(int block, int rest) const {
    if constexpr (T::FIXED) return a.part + ((size_t)rest * T::SPLIT + block) * T::TILE_M * ROWS;
    const int which = line.start(block) / T::UNITS_PER_SET == rest ? 0 : 1;
    return a.part + ((size_t)block * 2 + which) * T::TILE_M * ROWS;
  }

  // The sums of a piece: some tokens at a time to where all threads find them, then out, or to memory.
  LB_DEV void conclude(const Totals& y, const Piece& p, int part, int lane) const {
    const int first = p.token_block * T::TILE_M;
    for (int c = 0; c < T::TILE_M / CHUNK; ++c) {
      group_sync(0, ROLES);
#pragma unroll
      for (int t = 0; t < TT; ++t)
        if (t / CHUNK_TILES == c) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int token = t % CHUNK_TILES * 8 + lane % 4 * 2 + i % 2, row = part * 16 + i / 2 * 8 + lane / 4;
            sums()[token * T::REDUCE_STRIDE + row] = (float)y[0][t][i];
          }
        }
      group_sync(0, ROLES);
      const float* held = sums();
      if (p.rest >= 0) {
        float* mine = partial(T::FIXED ? p.share : blockIdx.x, p.rest) + c * CHUNK * ROWS;
        for (int i = threadIdx.x; i < CHUNK * ROWS; i += ROLES)
          if (first + c * CHUNK + i / ROWS < a.tokens) mine[i] = held[i / ROWS * T::REDUCE_STRIDE + i % ROWS];
      } else {
#if LB_ROWS_OUT
        write_rows<OUT>(a, p.set, first + c * CHUNK, CHUNK, threadIdx.x, ROLES,
                        [&](int token, int row) { return held[token * T::REDUCE_STRIDE + row]; });
#else
        for (int i = threadIdx.x; i < CHUNK * OUT; i += ROLES) {
          const int token = first + c * CHUNK + i / OUT;
          const float* at = held + i / OUT * T::REDUCE_STRIDE + i % OUT;
          if (token < a.tokens) finish(a, p.set, i % OUT, token, at[0], T::GATED ? at[64] : 0.0f);
        }
#endif
      }
    }
    if (p.rest >= 0) join(p);
  }

  // Whoever comes last adds all parts of a tile up, always in the same order.
  LB_DEV void join(const Piece& p) const {
    int from = 0, to = T::SPLIT - 1;
    if constexpr (!T::FIXED)
      from = line.owner(p.rest * T::UNITS_PER_SET), to = line.owner((p.rest + 1) * T::UNITS_PER_SET - 1);
    fence();
    group_sync(0, ROLES);
    if (threadIdx.x == 0) {
      *last() = arrive(a.count + p.rest) == to - from;
      if (*last()) a.count[p.rest] = 0;  // for the next launch
    }
    group_sync(0, ROLES);
    if (!*last()) return;
    fence();
#if LB_ROWS_OUT
    write_rows<OUT>(a, p.set, p.token_block * T::TILE_M, T::TILE_M, threadIdx.x, ROLES, [&](int token, int row) {
      float v = 0.0f;
      for (int other = from; other <= to; ++other) v += load_fresh(partial(other, p.rest) + token * ROWS + row);
      return v;
    });
#else
    for (int i = threadIdx.x; i < T::TILE_M * OUT; i += ROLES) {
      const int token = p.token_block * T::TILE_M + i / OUT;
      if (token >= a.tokens) break;
      float v = 0.0f, up = 0.0f;
      for (int other = from; other <= to; ++other) {
        const float* at = partial(other, p.rest) + i / OUT * ROWS + i % OUT;
        v += load_fresh(at);
        if (T::GATED) up += load_fresh(at + 64);
      }
      finish(a, p.set, i % OUT, token, v, up);
    }
#endif
  }

  static constexpr int OUT = T::GATED ? 64 : ROWS;
};

LB_DEV void stream(const Args& a) {
  const Line line((int)gridDim.x, (a.tokens + T::TILE_M - 1) / T::TILE_M);
  const Pipeline pipeline = {a, shared_memory(), line};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  pipeline.prepare_block();
  if (warp >= T::WARPS) {
    if constexpr (T::FEW > 0) registers_less<T::FEW>();
    if (warp == T::WARPS && lane == 0) pipeline.fetch();
#if LB_ROWS_IN
    if (T::GROUP_X && warp == T::WARPS + 1) pipeline.fetch_scales(lane);
#endif
    return;
  }
  if constexpr (T::FEW > 0) registers_more<T::MANY>();
  wait_for_inputs();
  Slot at;
  for (Pieces pieces(line, blockIdx.x); pieces.more();) {
    const Piece p = pieces.next();
    Totals y = {};
    pipeline.multiply(y, p, at, warp, lane);
    pipeline.conclude(y, p, warp, lane);
  }
}
