// Tables of products of a vector of activations with every centroid.

// To `to`: the products of the DIM activations at `x` with SIZE centroids, whose coordinates lie one behind the other.
template <int DIM, int SIZE> LB_INLINE void products(const float* x, const float* flat, float* to) {
  static_assert(SIZE % 16 == 0, "whole vectors");
  for (int j = 0; j < SIZE; j += 16) {
    F sum = fmul(fset1(x[0]), fload(flat + j));
#pragma GCC unroll 16
    for (int e = 1; e < DIM; ++e) sum = fma_(fset1(x[e]), fload(flat + e * SIZE + j), sum);
    fstore(to + j, sum);
  }
}
