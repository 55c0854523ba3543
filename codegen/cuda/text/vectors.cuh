// Vector formats for few tokens: eight rows of vectors by a run of columns for every warp.
//
// A row of eight float16 numbers in shared memory is what a lane names in `ldmatrix`, and eight such rows transposed are a
// left operand of `mma`. So a centroid is gathered by naming it: one lane's address brings eight weights to where they
// are multiplied. Shorter vectors fill a row with zeros and stand in it where their rows of the operand are: PHASES
// versions of every centroid, and as many products, each with the same activation. Longer ones take two rows.
//
// Codebooks that do not fit are gathered from memory, a run of columns ahead, into rows of a warp's own.

constexpr int TT = T::TOKEN_TILES;
constexpr int P = T::PHASES, HALVES = T::DIM > 8 ? 2 : 1;
constexpr int BLOCKS = T::TILE_ROWS / 16;  // of 16 rows
constexpr int STEP_COLUMNS = 16 / P;
constexpr int RUN = T::UNIT_STEPS * STEP_COLUMNS;
constexpr int CENTROID = HALVES * P * 16;  // bytes in shared memory
using Sums = float[T::ROW_TILES][BLOCKS][TT][4];

// What a lane is in a product: 16 places along the depth are columns by phases, four of them in a row for lanes t.
struct Lane {
  int lane, column, phase, half, first;

  LB_DEV explicit Lane(int lane) : lane(lane) {
    const int place = lane % 8 / 2 * 4 + lane / 16 * 2 + lane % 2;
    column = place / P, phase = place % P, half = lane / 8 % 2;
    first = HALVES == 2 ? 0 : half * P + phase;
  }
  // Bytes from a centroid's beginning to what this lane gathers.
  LB_DEV int inside() const { return HALVES == 2 ? half * 16 : phase * 16; }
};

// One codebook and its indices: BYTES an index, SIZE centroids; SHARED: in shared memory from AT on.
template <int BYTES_, int SIZE_, bool SHARED_, int AT_> struct Book {
  static constexpr int BYTES = BYTES_, SIZE = SIZE_, AT = AT_, WORDS = BYTES * 2;
  static constexpr bool SHARED = SHARED_;
};
using Main = Book<T::INDEX_BYTES, T::CENTROIDS, T::BOOK_SHARED, 0>;
using Residual = Book<T::RESIDUAL_BYTES, T::RESIDUAL, true, T::BOOK_BYTES>;

// The eight indices of a column.
template <class B> struct Indices {
  uint32_t w[B::WORDS];

  LB_DEV void load(const char* from) {
    if constexpr (B::BYTES == 1) {
      const uint2 v = load_once8(from);
      w[0] = v.x, w[1] = v.y;
    } else {
      const uint4 v = load_once16(from);
      w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
    }
  }

  // The index this lane gathers for a block of 16 rows.
  LB_DEV uint32_t pick(int block, const Lane& l) const {
    constexpr int SPAN = HALVES == 2 ? 1 : 2 * P, PER = 4 / B::BYTES, BITS = 8 * B::BYTES;
    const int start = block * SPAN;
    uint32_t word = w[start / PER];
#pragma unroll
    for (int i = 1; i < (SPAN + PER - 1) / PER; ++i) word = l.first / PER == i ? w[start / PER + i] : word;
    return word >> (start % PER + l.first % PER) * BITS & ((1u << BITS) - 1);
  }
};

template <class B> struct Run {
  Indices<B> step[T::UNIT_STEPS];

  // Columns of the main part, from `column` on and before `end`; beyond it the last one again, for x is zero there.
  LB_DEV void load(const void* index, int tile, int column, int end, const Lane& l) {
    constexpr int BYTES = 8 * B::BYTES;
    const char* from = (const char*)index + ((size_t)tile * T::COLUMNS + column + l.column) * BYTES;
    if (column + RUN <= end) {
#pragma unroll
      for (int s = 0; s < T::UNIT_STEPS; ++s) step[s].load(from + s * STEP_COLUMNS * BYTES);
    } else {
#pragma unroll
      for (int s = 0; s < T::UNIT_STEPS; ++s) {
        const int beyond = column + l.column + s * STEP_COLUMNS - (end - 1);
        step[s].load(from + (s * STEP_COLUMNS - (beyond > 0 ? beyond : 0)) * BYTES);
      }
    }
  }
};

// Where a unit's columns are: of the indices, of the packed activations; which codebook.
struct Span {
  int column, end, x, group;

  LB_DEV explicit Span(int unit) {
    group = T::GROUPS > 1 ? unit / T::GROUP_UNITS : 0;
    const int in = (unit - group * T::GROUP_UNITS) * RUN;
    column = group * T::GROUP_COLUMNS + in, end = (group + 1) * T::GROUP_COLUMNS;
    x = T::OUTLIER_PAD + group * T::GROUP_PAD + in;
  }
};

// The right operands of a step: activations of STEP_COLUMNS columns, each as often as there are phases. rows: where
// this lane's begin.
LB_DEV void load_x(uint32_t (&x)[TT][2], const uint16_t* const (&rows)[TT], int column) {
#pragma unroll
  for (int t = 0; t < TT; ++t) {
    const uint16_t* at = rows[t] + column;
    if constexpr (P == 1) {
      const uint2 v = *(const uint2*)at;
      x[t][0] = v.x, x[t][1] = v.y;
    } else if constexpr (P == 2) {
      const uint32_t v = *(const uint32_t*)at;
      x[t][0] = prmt<0x1010>(v, 0), x[t][1] = prmt<0x3232>(v, 0);
    } else {
      x[t][0] = x[t][1] = *at * 0x00010001u;
    }
  }
}

struct Warp {
  const Args& a;
  uint32_t shared, stage;  // shared addresses: of codebooks, of this warp's rows
  int first_token, segment;
  Lane l;

  LB_DEV const uint16_t* centroid(int group, uint32_t index) const {
    return a.book + ((size_t)(segment * T::GROUPS + group) * Main::SIZE + index) * T::DIM;
  }

  LB_DEV uint32_t row_of(int parity, int s, int block) const {
    return stage + (((parity * T::UNIT_STEPS + s) * BLOCKS + block) * 32 + l.lane) * 16;
  }

  // Ask for the centroids of a run that are not in shared memory.
  LB_DEV void gather(const Run<Main>& run, const Span& at, int parity) const {
    if constexpr (!Main::SHARED) {
#pragma unroll
      for (int s = 0; s < T::UNIT_STEPS; ++s)
#pragma unroll
        for (int b = 0; b < BLOCKS; ++b) {
          const uint16_t* from = centroid(at.group, run.step[s].pick(b, l)) + (HALVES == 2 ? l.half * 8 : 0);
          constexpr int BYTES = T::DIM % 8 == 0 ? 16 : T::DIM * 2;
          copy_cached<BYTES>(row_of(parity, s, b) + (P > 1 ? l.phase * BYTES : 0), from);
        }
      copies_commit();
    }
  }

  template <class B> LB_DEV void multiply_with(float (&y)[BLOCKS][TT][4], const Indices<B>& step, const Span& at,
                                               const uint32_t (&x)[TT][2], uint32_t rows) const {
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
      uint32_t operand[4];
      const uint32_t book = shared + B::AT + at.group * (B::SIZE * CENTROID) + l.inside();
      ldmatrix_columns(operand, B::SHARED ? book + step.pick(b, l) * CENTROID : rows + b * 512);
#pragma unroll
      for (int t = 0; t < TT; ++t) mma(y[b][t], operand, x[t]);
    }
  }

  // Units `unit`, `unit` + WARPS ... of a tile that are before `stop`. Indices are asked for two units ahead, centroids one.
  LB_DEV void multiply(float (&y)[BLOCKS][TT][4], int tile, int unit, int stop) const {
    Run<Main> now, next, later;
    Run<Residual> now2, next2, later2;
    const uint16_t* rows[TT];
#pragma unroll
    for (int t = 0; t < TT; ++t) {  // of tokens that there are not the last one again: nobody reads their sums
      const int token = first_token + t * 8 + l.lane / 4;
      rows[t] = (const uint16_t*)a.ready + (size_t)(token < a.tokens ? token : a.tokens - 1) * T::X_COLUMNS +
                l.lane % 4 * 4 / P;
    }
    const auto load = [&](Run<Main>& run, Run<Residual>& run2, int u) {
      if (u >= stop) return;
      const Span at(u);
      run.load(a.index, tile, at.column, at.end, l);
      if constexpr (T::RESIDUAL > 0) run2.load(a.residual_index, tile, at.column, at.end, l);
    };
    if (unit >= stop) return;
    load(now, now2, unit);
    load(next, next2, unit + T::WARPS);
    gather(now, Span(unit), 0);
    for (int parity = 0; unit < stop; unit += T::WARPS, parity ^= 1) {
      const Span at(unit);
      if (unit + T::WARPS < stop)
        gather(next, Span(unit + T::WARPS), parity ^ 1);
      else
        copies_commit();
      load(later, later2, unit + 2 * T::WARPS);
      if constexpr (!Main::SHARED) {
        copies_wait<1>();
        warp_sync();
      }
#pragma unroll
      for (int s = 0; s < T::UNIT_STEPS; ++s) {
        uint32_t x[TT][2];
        load_x(x, rows, at.x + s * STEP_COLUMNS);
        multiply_with(y, now.step[s], at, x, row_of(parity, s, 0));
        if constexpr (T::RESIDUAL > 0) multiply_with(y, now2.step[s], at, x, 0);
      }
      if constexpr (!Main::SHARED) warp_sync();
      now = next, next = later;
      if constexpr (T::RESIDUAL > 0) now2 = next2, next2 = later2;
    }
  }

  // Outlier columns, few of them, have vectors of another length: weight by weight.
  LB_DEV uint32_t outlier(int row, int column) const {
    constexpr int DIM = T::OUTLIER_DIM;
    const int vector = row / DIM;
    if (row >= T::segment_rows(segment) || column >= T::OUTLIERS) return 0;
    const size_t at = ((size_t)(T::segment_outlier(segment) + vector / 8) * T::OUTLIERS + column) * 8 + vector % 8;
    const uint32_t index = T::OUTLIER_BYTES == 1 ? ((const unsigned char*)a.outlier_index)[at]
                                                 : ((const uint16_t*)a.outlier_index)[at];
    return a.outlier_book[((size_t)segment * T::OUTLIER_CENTROIDS + index) * DIM + row % DIM];
  }

  LB_DEV void multiply_outliers(float (&y)[BLOCKS][TT][4], int set, int r, int warp) const {
    for (int c = warp * 16; c < T::OUTLIERS; c += T::WARPS * 16) {
      const uint16_t* from = (const uint16_t*)a.ready;
      uint32_t x[TT][2];
#pragma unroll
      for (int t = 0; t < TT; ++t) {
        const int token = first_token + t * 8 + l.lane / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i)
          x[t][i] = token < a.tokens
                        ? *(const uint32_t*)(from + (size_t)token * T::X_COLUMNS + c + i * 8 + l.lane % 4 * 2) : 0;
      }
#pragma unroll
      for (int b = 0; b < BLOCKS; ++b) {
        uint32_t operand[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Place p = place_of(set, r * T::TILE_ROWS + b * 16 + i % 2 * 8 + l.lane / 4);
          const int column = c + i / 2 * 8 + l.lane % 4 * 2;
          operand[i] = outlier(p.row, column) | outlier(p.row, column + 1) << 16;
        }
#pragma unroll
        for (int t = 0; t < TT; ++t) mma(y[b][t], operand, x[t]);
      }
    }
  }
};

// Codebooks of a segment into shared memory, PHASES versions of every centroid.
template <class B> LB_DEV void load_book(unsigned char* shared, const uint16_t* book, int segment) {
  constexpr int PARTS = HALVES * P, ALL = T::GROUPS * B::SIZE * PARTS;
  for (int i = threadIdx.x; i < ALL; i += T::WARPS * 32) {
    const uint16_t* from = book + ((size_t)segment * T::GROUPS * B::SIZE + i / PARTS) * T::DIM;
    uint32_t words[4] = {};
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int lane = HALVES == 2 ? i % 2 * 8 + j : j - i % P * (P > 1 ? T::DIM : 0);
      if (lane >= 0 && lane < T::DIM) words[j / 2] |= (uint32_t)from[lane] << 16 * (j % 2);
    }
    ((uint4*)(shared + B::AT))[i] = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

LB_DEV void leave(const Block& b, const Sums& y) {
  const int warp = b.thread / 32, lane = b.thread % 32;
#pragma unroll
  for (int r = 0; r < T::ROW_TILES; ++r)
#pragma unroll
    for (int m = 0; m < BLOCKS; ++m)
#pragma unroll
      for (int t = 0; t < TT; ++t)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = t * 8 + lane % 4 * 2 + i % 2, row = r * T::TILE_ROWS + m * 16 + i / 2 * 8 + lane / 4;
          b.sums()[(warp * T::TILE_M + token) * T::REDUCE_STRIDE + row] = y[r][m][t][i];
        }
}

LB_DEV void stream(const Args& a) {
  const Share share = {(int)gridDim.x};
  const Block block = {a, shared_memory(), share, (int)threadIdx.x, (int)blockIdx.y * T::TILE_M};
  const int warp = block.thread / 32, lane = block.thread % 32;
  const int start = share.start(blockIdx.x), end = share.start(blockIdx.x + 1);
  const uint32_t at = shared_address(block.shared);
  constexpr int ROWS_OF_WARP = Main::SHARED ? 0 : 2 * T::UNIT_STEPS * BLOCKS * 512, BOOKS = T::RING_BYTES - T::WARPS * ROWS_OF_WARP;
  int held = -1;
  if constexpr (!Main::SHARED)  // what copies of short vectors leave stays zero
    for (int i = block.thread; i < T::WARPS * ROWS_OF_WARP / 16; i += T::WARPS * 32)
      ((uint4*)(block.shared + BOOKS))[i] = make_uint4(0, 0, 0, 0);
  block_sync();
  bool waited = false;
  for (int begin = start; begin < end;) {
    const int set = begin / T::UNITS_PER_SET, first = set * T::UNITS_PER_SET;
    const int stop = end < first + T::UNITS_PER_SET ? end : first + T::UNITS_PER_SET;
    Sums y = {};
#pragma unroll
    for (int r = 0; r < T::ROW_TILES; ++r) {
      const int tile = tile_of(set, r), segment = segment_of(tile);
      if (segment != held) {
        block_sync();
        if constexpr (Main::SHARED) load_book<Main>(block.shared, a.book, segment);
        if constexpr (T::RESIDUAL > 0) load_book<Residual>(block.shared, a.residual_book, segment);
        block_sync();
        held = segment;
      }
      if (!waited) {
        wait_for_inputs();
        waited = true;
      }
      const int from = begin - first - r * T::TILE_UNITS, to = stop - first - r * T::TILE_UNITS;
      const Warp w = {a, at, at + BOOKS + warp * ROWS_OF_WARP, block.first_token, segment, Lane(lane)};
      if (T::OUTLIERS > 0 && from <= 0 && to > 0) w.multiply_outliers(y[r], set, r, warp);
      w.multiply(y[r], tile, (from > 0 ? from : 0) + warp, to < T::TILE_UNITS ? to : T::TILE_UNITS);
    }
    leave(block, y);
    block_sync();
    block.conclude(set, begin, stop, blockIdx.x);
    block_sync();
    begin = stop;
  }
  let_next_start();
}
