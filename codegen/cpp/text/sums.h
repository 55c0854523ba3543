// Tables of products of a vector of activations with every centroid.

// To `to`: the products of the DIM activations at `x` with SIZE centroids, whose coordinates lie one behind the other. The
// bits of the largest of them.
template <int DIM, int SIZE> LB_INLINE uint32_t products(const float* x, const float* flat, float* to) {
  static_assert(SIZE % 16 == 0, "whole vectors");
  Most most = no_most();
  F each[DIM];  // read before anything is written, which might be x for all that the compiler knows
#pragma GCC unroll 16
  for (int e = 0; e < DIM; ++e) each[e] = fset1(x[e]);
  for (int j = 0; j < SIZE; j += 16) {
    F sum = fmul(each[0], fload(flat + j));
#pragma GCC unroll 16
    for (int e = 1; e < DIM; ++e) sum = fma_(each[e], fload(flat + e * SIZE + j), sum);
    fstore(to + j, sum);
    take(most, sum);
  }
  return bits_of(most);
}
