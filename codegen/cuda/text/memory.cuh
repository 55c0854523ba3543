// From memory to the ring of stages of the warps that share one: weights, side values, activations.

// Of numbers that are not negative: signed division takes more instructions.
struct Quotient { int whole, rest; };
LB_DEV constexpr Quotient quotient(int n, int by) {
  return {(int)((unsigned)n / (unsigned)by), (int)((unsigned)n % (unsigned)by)};
}

// Which row tile of the packed matrix is the r-th of a set. What lies beyond the last is read, but not used.
LB_DEV int tile_of(int set, int r) {
  const int tile = T::GATED ? set + r * T::TILE_SETS : set * T::ROW_TILES + r;
  return tile < T::TILES ? tile : T::TILES - 1;
}

// Where parts of a stage begin.
LB_DEV constexpr int plane_at(int p) {
  int at = 0;
  for (int i = 0; i < p; ++i) at += T::ROW_TILES * T::UNIT_BLOCKS * 512 * T::plane_bits(i);
  return at;
}
constexpr int SIDE_VALUES = T::IN_LOOP ? T::ROW_TILES * T::FLUSHES * 64 : 0;
constexpr int SCALE_AT = plane_at(T::PLANES);
constexpr int ZERO_AT = SCALE_AT + SIDE_VALUES * T::SIDE_BYTES;
constexpr int OFFSET_AT = ZERO_AT + (T::ZERO ? SIDE_VALUES : 0);
constexpr int WEIGHT_BYTES = OFFSET_AT + (T::OFFSET ? SIDE_VALUES * T::SIDE_BYTES : 0);
constexpr int X_SCALE_AT = WEIGHT_BYTES;
constexpr int X_SCALE_BYTES = T::GROUP_X ? T::FLUSHES * T::SCALE_TOKENS * T::X_SIDES * 4 : 0;
constexpr int X_AT = (X_SCALE_AT + X_SCALE_BYTES + T::ALIGN - 1) / T::ALIGN * T::ALIGN;
#if LB_ROWS_IN
constexpr int X_STRIDE = T::UNIT_BLOCKS * 64;  // bytes, whatever operands are
#else
constexpr int X_STRIDE = T::UNIT_BLOCKS * 8 * T::BITS;
#endif
constexpr int STAGE = X_AT + T::TILE_M * X_STRIDE;
static_assert(STAGE % (T::WGMMA ? 1024 : 16) == 0, "stages are aligned");

// The unit of weights that meets unit u of activations: leading columns may be two digits, of which the high ones are all
// activations' first units.
LB_DEV int weights_of(int u) { return T::LEAD_UNITS > 0 && u >= T::LEAD_UNITS ? u - T::LEAD_UNITS : u; }

// The group whose scale holds for the j-th part of unit u of a row.
LB_DEV int group_of(int u, int j) {
  const int group = quotient(u * T::UNIT_BLOCKS * 64 + j * T::FLUSH, T::GROUP).whole;
  return group < T::GROUPS ? group : T::GROUPS - 1;
}

// 16-byte pieces of a row of x in shared memory change places, so that eight rows' pieces lie in different banks.
LB_DEV int swizzle(int row, int piece) { return X_STRIDE == 64 ? piece ^ (row >> 1 & 3) : piece ^ (row & 7); }

// The scales of the activations of unit u, for all its flushes (of nibbles each with its tokens' least levels).
LB_DEV const float* scales_of(const Args& a, int token_block, int u) {
  return a.x_scale + (size_t)(token_block * T::UNITS_PER_SET + u) * T::FLUSHES * T::SCALE_TOKENS * T::X_SIDES;
}

#if LB_ROWS_IN
// Ask for the scales of tokens from `first` on, of all flushes of unit u, from the ends of their rows. Of tokens there are
// not the last one's, and of columns beyond the row those of the last group: what they are multiplied with is zero.
template <int THREADS> LB_DEV void request_scales(const Args& a, uint32_t to, int me, int u, int first) {
  constexpr int ALL = T::FLUSHES * T::TILE_M;
#pragma unroll
  for (int start = 0; start < ALL; start += THREADS) {
    const int i = start + me, j = quotient(i, T::TILE_M).whole, row = quotient(i, T::TILE_M).rest;
    if (start + THREADS > ALL && i >= ALL) break;
    const int token = first + row < a.tokens ? first + row : a.tokens - 1;
    const int group = quotient(u * T::UNIT_BLOCKS * 64 + j * T::FLUSH, T::X_GROUP).whole;
    const float* from = row_scale(a, token, group < T::X_GROUPS ? group : T::X_GROUPS - 1);
    copy_cached<4>(to + (j * T::SCALE_TOKENS + row) * 4, from);
  }
}

#endif
struct Ring {
  unsigned char* stage;  // of the warps that share it
  uint64_t* barrier;
  uint64_t policy;
  int me, group;  // thread of those warps; which of the groups of warps

  // Ask for the weights of unit u of a set: planes, then side values.
  LB_DEV void request_weights(const Args& a, int slot, int set, int u) const {
    unsigned char* to = stage + slot * STAGE;
    if constexpr (T::BULK) {
      if (me == 0) {
        barrier_expect(barrier + slot, WEIGHT_BYTES);
        weights<true>(a, to, slot, set, u);
      }
    } else {
      weights<false>(a, to, slot, set, u);
    }
  }

  template <bool WHOLE> LB_DEV void run(void* to, const void* from, int bytes, int slot) const {
    if constexpr (WHOLE) {
      copy_bulk(to, from, bytes, barrier + slot, policy);
    } else {
#pragma unroll
      for (int start = 0; start < bytes; start += T::ROW_WARPS * 512) {
        const int i = start + me * 16;
        if (start + T::ROW_WARPS * 512 <= bytes || i < bytes) copy_stream((char*)to + i, (const char*)from + i, policy);
      }
    }
  }

  template <bool WHOLE> LB_DEV void weights(const Args& a, unsigned char* to, int slot, int set, int x_unit) const {
    const int u = weights_of(x_unit);
#pragma unroll
    for (int r = 0; r < T::ROW_TILES; ++r) {
      const size_t tile = tile_of(set, r);
#pragma unroll
      for (int p = 0; p < T::PLANES; ++p) {
        constexpr int BLOCK = 512;  // bytes of a block and bit
        const int bytes = BLOCK * T::plane_bits(p);
        const char* from = (const char*)a.plane[p] + tile * (T::K_BLOCKS * bytes);
        unsigned char* at = to + plane_at(p) + r * T::UNIT_BLOCKS * bytes;
        if constexpr (T::K_BLOCKS % T::UNIT_BLOCKS == 0) {
          run<WHOLE>(at, from + u * T::UNIT_BLOCKS * bytes, T::UNIT_BLOCKS * bytes, slot);
        } else {
#pragma unroll
          for (int b = 0; b < T::UNIT_BLOCKS; ++b) {  // beyond the row the last block again: x is zero there
            const int block = u * T::UNIT_BLOCKS + b;
            run<WHOLE>(at + b * bytes, from + (block < T::K_BLOCKS ? block : T::K_BLOCKS - 1) * bytes, bytes, slot);
          }
        }
      }
      if constexpr (T::IN_LOOP) {
#pragma unroll
        for (int j = 0; j < T::FLUSHES; ++j) {
          const size_t from = (tile * T::GROUPS + group_of(u, j)) * 64;
          const int at = (r * T::FLUSHES + j) * 64;
          run<WHOLE>(to + SCALE_AT + at * T::SIDE_BYTES, a.scale + from * T::SIDE_BYTES, 64 * T::SIDE_BYTES, slot);
          if constexpr (T::ZERO) run<WHOLE>(to + ZERO_AT + at, a.zero + from, 64, slot);
          if constexpr (T::OFFSET)
            run<WHOLE>(to + OFFSET_AT + at * T::SIDE_BYTES, a.offset + from * T::SIDE_BYTES, 64 * T::SIDE_BYTES, slot);
        }
      }
    }
  }

  // Ask for the activations that meet unit u: rows from `first` on, zeros where the matrix has ended.
  LB_DEV void request_x(const Args& a, int slot, int u, int first) const {
    unsigned char* to = stage + slot * STAGE + X_AT;
#if LB_ROWS_IN
    if constexpr (T::GROUP_X)
      request_scales<T::ROW_WARPS * 32>(a, shared_address(to) - X_AT + X_SCALE_AT, me, u, first);
#else
    if constexpr (T::GROUP_X) run<false>(to - X_AT + X_SCALE_AT, scales_of(a, first / T::TILE_M, u), X_SCALE_BYTES, slot);
#endif
#if LB_ROWS_IN
    constexpr int ROW = T::X_COLUMNS;
    constexpr int PIECES = X_STRIDE / 16, ALL = T::TILE_M * PIECES, STEP = T::ROW_WARPS * 32;
#else
    constexpr int PIECES = X_STRIDE / 16, ROW = T::X_COLUMNS * T::BITS / 8, ALL = T::TILE_M * PIECES, STEP = T::ROW_WARPS * 32;
#endif
#pragma unroll
    for (int start = 0; start < ALL; start += STEP) {
      const int i = start + me, row = quotient(i, PIECES).whole, piece = quotient(i, PIECES).rest;
      if (start + STEP > ALL && i >= ALL) break;
      unsigned char* at = to + row * X_STRIDE + swizzle(row, piece) * 16;
      const int token = first + row, place = u * PIECES + piece;
      if constexpr (T::PLAIN_COLUMNS) {
        int bytes = ROW - place * 16;
        bytes = token < a.tokens ? (bytes < 0 ? 0 : bytes > 16 ? 16 : bytes) : 0;
        const char* from = (const char*)a.ready;
#if LB_ROWS_IN
        copy_padded(at, bytes ? from + (size_t)token * T::X_ROW + place * 16 : from, bytes);
#else
        copy_padded(at, bytes ? from + (size_t)token * ROW + place * 16 : from, bytes);
#endif
      } else {
        gather(a, at, token, place * 8);
      }
    }
  }

  // Eight columns one by one: rows of x are not aligned, or groups are padded.
  LB_DEV void gather(const Args& a, unsigned char* at, int token, int col) const {
    uint32_t pair[4];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int group = (col + i) / T::GROUP, inside = (col + i) % T::GROUP, from = group * T::SOURCE_GROUP + inside;
      const bool there = token < a.tokens && inside < T::SOURCE_GROUP && from < T::K;
      const uint32_t value = there ? ((const uint16_t*)a.x)[(size_t)token * T::K + from] : 0;
      pair[i / 2] = i % 2 ? pair[i / 2] | value << 16 : value;
    }
    *(uint4*)at = make_uint4(pair[0], pair[1], pair[2], pair[3]);
  }

  // What was asked for `AHEAD` requests ago is there, for all who share the stage, and all have read the last one.
  LB_DEV void wait(int slot, uint32_t parity) const {
    copies_wait<T::AHEAD - 1>();
    if constexpr (T::BULK) barrier_wait(barrier + slot, parity);
    if constexpr (T::ROW_WARPS == 1)
      warp_sync();
    else
      group_sync(group, T::ROW_WARPS * 32);
  }
};
