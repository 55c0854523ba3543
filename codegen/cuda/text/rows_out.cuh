// The output as rows of bytes, for a kernel that multiplies them: see `codegen/rounded.py`.
//
// A team of neighbouring lanes takes a group of columns of a token, which a thread block has all sums of: it finds the
// largest magnitude or the range, then rounds. Here T holds what `prepare` has in the kernels that round for themselves.
namespace rows_out {

#include "traits_out.cuh"

#include "level.cuh"

// Sums of `tokens` tokens from `first` on and of all rows of a set, as sum(token, row) gives them, out. All lanes of a
// warp have the same token.
template <int OUT_ROWS, class Sum>
LB_DEV void write_rows(const Args& a, int set, int first, int tokens, int thread, int threads, Sum sum) {
  constexpr int LANES = T::SPAN < 32 ? T::SPAN : 32, EACH = T::SPAN / LANES, ITEMS = OUT_ROWS / EACH;
  static_assert(OUT_ROWS % T::SPAN == 0 && ITEMS % 32 == 0, "a thread block has whole groups");
  for (int i = thread; i < tokens * ITEMS; i += threads) {
    const int inside = i / ITEMS, token = first + inside, row = i % ITEMS / LANES * T::SPAN + i % LANES;
    if (token >= a.tokens) break;
    const int column = set * OUT_ROWS + row, group = column / T::X_GROUP;
    unsigned char* out = (unsigned char*)a.out + (size_t)token * T::ROW_BYTES;
    float v[EACH], scale = 1.0f, inverse = 1.0f;
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int at = row + e * LANES;
      v[e] = finish(a, set, at, token, sum(inside, at), ::T::GATED ? sum(inside, at + 64) : 0.0f);
    }
    float top = group < T::X_WIDE ? (float)T::X_WIDE_TOP : T::X_TOP, least = T::X_MANTISSA < 0 ? -top - 1.0f : -top;
    if constexpr (T::STATIC_X) {
      scale = group < T::X_GROUPS ? a.output_scale[group] : 0.0f;
      inverse = scale > 0.0f ? divide(1.0f, scale) : 0.0f;
    } else {
      uint32_t most = 0;
      float high = 0.0f, low = 0.0f;
#pragma unroll
      for (int e = 0; e < EACH; ++e) {
        const uint32_t size = float_bits(v[e]) & 0x7fffffff;
        most = size > most ? size : most;
        high = fmaxf(high, v[e]), low = fminf(low, v[e]);
      }
      most = lanes_max(most, LANES);
      float largest = bits_float(most) * T::X_CLIP, from = 0.0f;
      if constexpr (T::ASYM_X) {  // beside zero, magnitudes of either sign are in the order of their bits
        high = bits_float(lanes_max(float_bits(high), LANES));
        from = -bits_float(lanes_max(float_bits(-low) & 0x7fffffff, LANES));
        if (group >= T::X_WIDE && most < 0x7f800000) largest = (high - from) * T::X_CLIP;
      }
#include "steps.cuh"
      if (i % LANES == 0 && group < T::X_GROUPS) ((float*)(out + T::SCALES))[group] = scale;
    }
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
      const int at = column + e * LANES;
      if (at < T::SCALES) out[byte_of(at)] = (unsigned char)operand_of(level(v[e] * inverse, least, top));
    }
  }
}

}  // namespace rows_out
using rows_out::write_rows;
