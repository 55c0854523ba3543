"""The library backend: weights dequantized block by block, multiplied by torch's own GEMM."""
