"""What dequantizing a matrix and multiplying it with the library's GEMM costs: bytes moved, and a share of the peak."""

from __future__ import annotations

from importlib.util import find_spec

from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.gpus import LAUNCH, X_BYTES, gpu_of
from lowbit.compiler.ir.target import Target

__all__ = ["CPU_GEMM", "predict"]

_FUSED, _PASSES = 4.0, 46.0
"""Bytes a GPU moves for each weight beside its words and the result: fused by Inductor, where words are read more than
once because their order is not the result's; and in torch's passes, each of which goes through memory."""

_CALLS = {True: 3, False: 16}  # launches of a block, fused or not
_F32_SHARE = 1 / 16  # of a GPU's 16-bit matrix rate: float32 products do without matrix units

_UNPACK = 16e-9
"""Seconds one CPU core takes for each weight that torch unpacks; measured on Cascade Lake, as are GEMMs there."""

CPU_GEMM = {
    "avx512bf16": 112e9,
    "avx512vbmi": 112e9,
    "avx512vnni": 112e9,
    "avx512": 112e9,
    "avx2vnni": 70e9,
    "avx2": 70e9,
}
"""float32 operations a second that torch's GEMM reaches on one core; below AVX-512 by width and clock."""


def predict(spec: KernelSpec, target: Target, m: int, blocks: int) -> float:
    """Seconds of one call with `m` tokens, the matrix dequantized in `blocks` blocks of rows."""
    weights = float(spec.rows * spec.blocks * 32)  # every term of a sum is decoded, and multiplied with the others
    operations = 2.0 * m * weights / spec.terms
    if target.kind == "cpu":
        return weights * _UNPACK + operations / CPU_GEMM[target.arch]
    gpu, width = gpu_of(target), X_BYTES[spec.x_dtype]
    rate = gpu.matrix16 * (_F32_SHARE if spec.x_dtype == "f32" else 1.0)
    moved = weights * (2 * width + spec.fmt.bits / 8) + m * width * (spec.k * blocks + spec.n_out)
    multiply = operations / rate + moved / gpu.bandwidth
    fused = find_spec("triton") is not None
    decode = weights * (_FUSED if fused else _PASSES) / gpu.bandwidth
    return blocks * (_CALLS[fused] + 1) * LAUNCH + decode + multiply
