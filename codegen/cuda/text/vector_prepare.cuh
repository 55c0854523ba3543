// The kernel before vector products: a token's activations in the order of the weight's columns, times column norms, as
// float16.

// The activation for a packed column, from `column` of the stored order, or nothing.
struct Given {
  int column;
  float x;

  LB_DEV Given(const Args& a, size_t token, int packed) : column(-1), x(0.0f) {
    const int main = packed - T::OUTLIER_PAD, in = main % T::GROUP_PAD;
    if (main < 0)
      column = packed < T::OUTLIERS ? packed : -1;
    else if (in < T::GROUP_COLUMNS)
      column = T::OUTLIERS + main / T::GROUP_PAD * T::GROUP_COLUMNS + in;
    if (column < 0) return;
    const uint16_t bits = ((const uint16_t*)a.x)[token * T::K + (T::ORDERED ? a.columns[column] : column)];
    x = T::X == 0 ? half_float(bits) : bfloat_float(bits);
  }
  LB_DEV float scaled(const Args& a) const { return T::COLUMN_NORM && column >= 0 ? x * a.norm_scale[column] : x; }
};

LB_DEV void prepare(const Args& a) {
  wait_for_inputs();
  let_next_start();
  const size_t token = blockIdx.x;
  const int me = threadIdx.x, warp = me / 32;
  uint32_t* most_of = (uint32_t*)shared_memory();
  float* sums = (float*)(most_of + T::PREPARE_THREADS / 32);
  uint32_t most = 0;
  float sum = 0.0f;
  for (int c = me; c < T::X_COLUMNS; c += T::PREPARE_THREADS) {
    const Given given(a, token, c);
    if constexpr (T::ROW_NORM) sum += given.x;
    if constexpr (T::COLUMN_NORM) sum = given.column < 0 ? sum : fma32(given.x, a.norm_bias[given.column], sum);
    const uint32_t size = float_bits(given.scaled(a)) & 0x7fffffff;
    most = size > most ? size : most;
  }
  most = lanes_max(most, 32);
  sum = lanes_sum(sum);
  if (me % 32 == 0) most_of[warp] = most, sums[warp] = sum;
  block_sync();
  sum = 0.0f;
  for (int i = 0; i < T::PREPARE_THREADS / 32; ++i) {
    most = most_of[i] > most ? most_of[i] : most;
    sum += sums[i];
  }
  const Halving halving(most);
  for (int c = me; c < T::X_COLUMNS; c += T::PREPARE_THREADS)
    ((uint16_t*)a.ready)[token * T::X_COLUMNS + c] = float_half(Given(a, token, c).scaled(a) * halving.unit);
  if (me == 0) a.x_scale[token] = halving.back, a.x_scale[a.tokens + token] = sum;
}
