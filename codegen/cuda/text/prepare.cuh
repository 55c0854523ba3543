// The kernel before: a token's activations, in packed columns, rounded to levels with a scale for all or for every group.
//
// Some threads, a team, share a group: first they find its largest magnitude or its range, then they round. Rounding is
// to nearest, ties to even. Bytes of 16 columns are stored in the order in which weights' operands have them; as nibbles
// two times 16 columns share the same bytes.

// Levels of 16 bits are two digits of 8: the high ones of the leading units' columns are stored before everything else,
// under 256 times the scale. Nibbles hold levels less the least one of the group, which stands behind the scale; those
// of 8 bits are two digits of 4.

constexpr int X_LANES = T::X_GROUPS == 1 || T::X_LEAD ? T::PREPARE_THREADS : T::TEAM;
constexpr int TEAMS = T::PREPARE_THREADS / X_LANES;
constexpr int PIECE = T::PIECE;
constexpr bool NIBBLES = T::BITS == 4;
constexpr int DIGIT = NIBBLES ? 16 : 256;
constexpr int HIGH_COLUMNS = T::LEAD_UNITS * T::UNIT_BLOCKS * 64, PACKED_COLUMNS = T::X_COLUMNS - HIGH_COLUMNS;
constexpr int HIGH_FLUSHES = T::LEAD_UNITS * T::FLUSHES;

// Where a group begins; the last one has what pads the row.
LB_DEV constexpr int group_start(int group) {
  return group >= T::X_GROUPS ? PACKED_COLUMNS : group * T::X_GROUP;
}

// The activation that meets a packed column.
LB_DEV float activation_at(const Args& a, size_t token, int column) {
  int from = column;
  if constexpr (!T::DENSE) {
    const int inside = column % T::GROUP;
    from = inside < T::SOURCE_GROUP ? column / T::GROUP * T::SOURCE_GROUP + inside : T::K;
  }
  if (from >= T::K) return 0.0f;
#if LB_ROWS_COPIED
  return row_level(a, token, from);
#else
  if constexpr (T::ORDERED) from = a.columns[from];
  const size_t at = token * T::K + from;
  if constexpr (T::X == 0) return half_float(((const uint16_t*)a.x)[at]);
  if constexpr (T::X == 1) return bfloat_float(((const uint16_t*)a.x)[at]);
  return ((const float*)a.x)[at];
#endif
}

LB_DEV void load_piece(float (&v)[PIECE], const Args& a, size_t token, int column) {
#if LB_ROWS_COPIED
#pragma unroll
  for (int i = 0; i < PIECE; ++i) v[i] = activation_at(a, token, column + i);
#else
  if constexpr (T::DENSE && !T::ORDERED && T::X != 2 && T::K % 8 == 0) {
#pragma unroll
    for (int i = 0; i < PIECE; i += 8) {
      uint4 held = make_uint4(0, 0, 0, 0);
      if (column + i < T::K) held = *(const uint4*)((const uint16_t*)a.x + token * T::K + column + i);
      const uint32_t words[4] = {held.x, held.y, held.z, held.w};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint16_t bits = words[j / 2] >> 16 * (j % 2);
        v[i + j] = T::X == 0 ? half_float(bits) : bfloat_float(bits);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < PIECE; ++i) v[i] = activation_at(a, token, column + i);
  }
#endif
}

#include "level.cuh"

LB_DEV void store_piece(const Args& a, size_t token, int column, const float (&v)[PIECE]) {
  constexpr int WORDS = PIECE * T::BITS / 32;
  uint32_t words[WORDS] = {};
#pragma unroll
  for (int i = 0; i < PIECE; ++i) {
    const int byte = i % 8 / 2 * 4 + i % 2 * 2 + i % 16 / 8, bit = T::BITS == 16 ? i * 16 : byte * 8 + i / 16 * 4;
    words[bit / 32] |= operand_of(v[i]) << bit % 32;
  }
  uint4* to = (uint4*)((char*)a.ready + token * (T::X_COLUMNS * T::BITS / 8)) + (unsigned)column / (128 / T::BITS);
#pragma unroll
  for (int i = 0; i < WORDS / 4; ++i)
    to[i] = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
}

// Levels of packed columns, as digits where they have two. least: of the group.
LB_DEV void store_levels(const Args& a, size_t token, int column, bool wide, float least, float (&v)[PIECE]) {
  if constexpr (NIBBLES) {
#pragma unroll
    for (int i = 0; i < PIECE; ++i) v[i] -= least;
  }
  if constexpr (HIGH_COLUMNS > 0) {
    float high[PIECE];
#pragma unroll
    for (int i = 0; i < PIECE; ++i) {
      high[i] = wide ? floorf((v[i] + (NIBBLES ? 0.0f : 128.0f)) * (1.0f / DIGIT)) : 0.0f;
      v[i] -= DIGIT * high[i];
    }
    if (column < HIGH_COLUMNS) store_piece(a, token, column, high);
    if (column >= PACKED_COLUMNS) return;
  }
  store_piece(a, token, HIGH_COLUMNS + column, v);
}

// The scale of some flushes of a token, where the main kernel looks for it. Beyond the row activations are zeros, and so
// is the least one.
LB_DEV void store_scale(const Args& a, int token, int flush, float scale, float least) {
  constexpr int EACH = T::X_SIDES * T::SCALE_TOKENS;
  float* at = a.x_scale + (size_t)(token / T::TILE_M) * T::UNITS_PER_SET * T::FLUSHES * EACH + token % T::TILE_M;
  float* low = at + (size_t)(HIGH_FLUSHES + flush) * EACH;
  *low = scale;
  if constexpr (NIBBLES) low[T::SCALE_TOKENS] = flush * T::FLUSH < PACKED_COLUMNS ? least : 0.0f;
  if (flush < HIGH_FLUSHES) {
    at[(size_t)flush * EACH] = DIGIT * scale;
    if constexpr (NIBBLES) at[(size_t)flush * EACH + T::SCALE_TOKENS] = 0.0f;
  }
}

// A float's bits as an unsigned integer with the same order, and back.
LB_DEV uint32_t in_order(uint32_t bits) { return bits >> 31 ? ~bits : bits | 0x80000000; }
LB_DEV float ordered_float(uint32_t place) { return bits_float(place >> 31 ? place & 0x7fffffff : ~place); }

// The largest over a team.
LB_DEV uint32_t team_max(uint32_t v) {
  v = lanes_max(v, X_LANES < 32 ? X_LANES : 32);
  if constexpr (X_LANES > 32) {
    uint32_t* all = (uint32_t*)shared_memory();
    if constexpr (T::ASYM_X || T::X_GROUPS > 1) block_sync();  // all have read what was there before
    if (threadIdx.x % 32 == 0) all[threadIdx.x / 32] = v;
    block_sync();
    for (int i = 0; i < X_LANES / 32; ++i) v = all[i] > v ? all[i] : v;
  }
  return v;
}

LB_DEV void prepare(const Args& a) {
  wait_for_inputs();
  let_next_start();
  const int token = blockIdx.x, team = threadIdx.x / X_LANES, me = threadIdx.x % X_LANES;
  constexpr int TIMES = (T::X_GROUPS + TEAMS - 1) / TEAMS, STRIDE = X_LANES * PIECE;
  for (int time = 0; time < TIMES; ++time) {
    const int group = time * TEAMS + team;
    const int first = group_start(group), last = group_start(group + 1);
    float v[PIECE], scale = 1.0f, inverse = 1.0f;
    float top = group < T::X_WIDE ? (float)T::X_WIDE_TOP : T::X_TOP, least = T::X_MANTISSA < 0 ? -top - 1.0f : -top;
#if LB_ROWS_COPIED
    if (group < T::X_GROUPS) scale = *row_scale(a, token, group);  // levels are levels already
#else
    if constexpr (T::STATIC_X) {
      scale = group < T::X_GROUPS ? a.input_scale[group] : 0.0f;
      inverse = scale > 0.0f ? divide(1.0f, scale) : 0.0f;
    } else if constexpr (T::ROUND || T::HALVED) {
      uint32_t most = 0;  // magnitudes are compared as integers: infinities and NaN are above all numbers
      uint32_t high = in_order(0), low = ~in_order(0);
      for (int c = first + me * PIECE; c < last; c += STRIDE) {
        load_piece(v, a, token, c);
#pragma unroll
        for (int i = 0; i < PIECE; ++i) {
          const uint32_t size = float_bits(v[i]) & 0x7fffffff;
          most = size > most ? size : most;
          if constexpr (T::ASYM_X) {
            const uint32_t place = in_order(float_bits(v[i]));
            high = place > high ? place : high;
            low = ~place > low ? ~place : low;
          }
        }
      }
      most = team_max(most);
      float largest = bits_float(most) * T::X_CLIP, from = 0.0f;
      if constexpr (T::ASYM_X) {
        high = team_max(high), low = team_max(low);
        from = ordered_float(~low);
        if (group >= T::X_WIDE) largest = (ordered_float(high) - from) * T::X_CLIP;
      }
#include "steps.cuh"
      if constexpr (T::HALVED) {
        const Halving halving(most);
        scale = halving.back, inverse = halving.unit;
      }
    }
#endif
    for (int c = first + me * PIECE; c < last; c += STRIDE) {
      load_piece(v, a, token, c);
      if constexpr (T::ROUND) {
#pragma unroll
        for (int i = 0; i < PIECE; ++i) v[i] = level(v[i] * inverse, least, top);
      } else if constexpr (T::HALVED) {
#pragma unroll
        for (int i = 0; i < PIECE; ++i) v[i] *= inverse;
      }
      store_levels(a, token, c, group < T::X_WIDE, least, v);
    }
    if constexpr (T::TOKEN_X) {
      if (me == 0 && group == 0) a.x_scale[token] = scale;
    } else if constexpr (T::GROUP_X) {
      const int end = group < T::X_GROUPS - 1 ? last / T::FLUSH : T::UNITS_PER_SET * T::FLUSHES - HIGH_FLUSHES;
      if (group < T::X_GROUPS)
        for (int f = first / T::FLUSH + me; f < end; f += X_LANES) store_scale(a, token, f, scale, least);
    }
  }
  for (int c = PACKED_COLUMNS + threadIdx.x * PIECE; c < HIGH_COLUMNS; c += T::PREPARE_THREADS * PIECE) {
    float none[PIECE] = {};
    store_levels(a, token, c, false, 0.0f, none);
  }
}
