// Where a column's byte is in a row between two kernels: pieces of 16 columns have those of two halves in turns.
LB_DEV constexpr int byte_of(int column) { return column / 16 * 16 + column % 8 * 2 + column % 16 / 8; }
#include "rows_order_check.cuh"
