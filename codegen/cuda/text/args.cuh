// What a launch gives: `arguments.py` has the same order.
struct Args {
  TensorMap map;  // of `ready`, for kernels of warpgroups
  const void* x;
  const void* ready;  // x, or what `prepare` makes of it
  float* x_scale;
  const int* columns;
  const float* input_scale;
  const uint32_t* plane[3];
  const unsigned char* scale;
  const unsigned char* zero;
  const unsigned char* offset;
  const float* tensor_scale;
  const void* index;  // of vector formats
  const uint16_t* book;
  const void* residual_index;
  const uint16_t* residual_book;
  const void* outlier_index;
  const uint16_t* outlier_book;
  const float* norm_scale;
  const float* norm_bias;
  const float* bias;
  const void* residual;
  void* out;
  float* part;
  int* count;
  int tokens;
#if LB_ROWS_OUT
  const float* output_scale;
#endif
};
