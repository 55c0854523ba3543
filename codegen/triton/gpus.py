"""Rates of GPUs, and what lane operations and matrix instructions cost on them: what predictions are made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from lowbit.codegen.decode import decode_program
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir import kernel as lbk
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import WeightFormat

__all__ = [
    "FINISH",
    "LATENCY",
    "LAUNCH",
    "X_BYTES",
    "Gpu",
    "decode_instructions",
    "gpu_of",
    "is_hopper",
    "matrix_rate",
    "multiplies_int4",
    "resident_programs",
    "uses_wgmma",
]

X_BYTES = {"f32": 4, "bf16": 2, "f16": 2}
"""Bytes of an activation."""


@dataclass(frozen=True)
class Gpu:
    """Rates of one architecture. bandwidth: bytes/s read; matrix16, matrix8: dense operations/s (a multiplication and
    an addition count two) of 16-bit floats and int8; lanes: 32-bit integer or float operations per clock and
    multiprocessor; shared, shared_sm: bytes a program, a multiprocessor may use."""

    multiprocessors: int
    clock: float
    bandwidth: float
    matrix16: float
    matrix8: float
    lanes: int
    shared: int
    shared_sm: int


# Vendors' data sheets: A100 80 GB, RTX 3090, RTX 4090, H200 (4.8 TB/s, 989 TFLOP/s). Reading reaches about 90% of the
# nominal bandwidth, matrix units about 80% of the peak.
_GPUS = {
    80: Gpu(108, 1.41e9, 0.9 * 2.04e12, 0.8 * 312e12, 0.8 * 624e12, 64, 163 << 10, 164 << 10),
    86: Gpu(82, 1.70e9, 0.9 * 0.94e12, 0.8 * 71e12, 0.8 * 284e12, 128, 99 << 10, 100 << 10),
    89: Gpu(128, 2.52e9, 0.9 * 1.01e12, 0.8 * 165e12, 0.8 * 661e12, 128, 99 << 10, 100 << 10),
    90: Gpu(132, 1.75e9, 0.9 * 4.8e12, 0.8 * 989e12, 0.8 * 1979e12, 96, 227 << 10, 228 << 10),
}
LAUNCH = 3.5e-6  # seconds a small kernel takes from launch to last store, replayed from a graph
LATENCY = 0.9e-6  # seconds from a request to memory until its data arrives under load
MMA_SYNC_SHARE = 0.5  # of a Hopper matrix unit's rate that instructions issued by one warp reach
FINISH = 1.5e-6  # seconds the last arriver of a split adds: its atomic and its reads


@cache
def gpu_of(target: Target) -> Gpu:
    """Rates of the target's architecture, or of the newest known one that is not newer."""
    number = int(target.arch.removeprefix("sm_").rstrip("a"))
    return _GPUS[max((n for n in _GPUS if n <= number), default=80)]


_COSTS = {"shr": 0.25, "shl": 0.25} | dict.fromkeys(
    ("and", "or", "multiply", "plus", "int_to_float", "half", "add", "sub", "mul", "fma", "gather"), 1.0
)
"""Of a decode program's operations. Shifts mostly go into others; what a gather loads is counted elsewhere, and what is
left is its conversion."""


@cache
def decode_instructions(fmt: WeightFormat) -> float:
    """Lane operations that decode one weight to a 16-bit float, counted over the format's decode program."""
    counted = {op: _COSTS.get(op.name.removeprefix("lbk."), 0.0) for op in decode_program(fmt).region.block.ops}
    tables = sum(2.0 * len(op.table.data) for op in counted if isinstance(op, lbk.Lut))
    return sum(counted.values()) + tables + 1.0  # and half a conversion, half a store


def uses_wgmma(schedule: Schedule, target: Target) -> bool:
    """Whether Triton multiplies with warpgroup instructions: Hopper, and 64 rows or more in the left operand."""
    left = schedule.tile_n if schedule.get("swap", 0) else schedule.tile_m
    return is_hopper(target) and left >= 64 and schedule.warps >= 4 and not schedule.get("gemv", 0)


def is_hopper(target: Target) -> bool:
    """Whether the target has warpgroup instructions."""
    return gpu_of(target) is _GPUS[90]


def multiplies_int4(target: Target) -> bool:
    """Whether matrix units multiply integers of four bits: from Ampere to Ada, not before and no longer on Hopper."""
    return 80 <= int(target.arch.removeprefix("sm_").rstrip("a")) < 90


def matrix_rate(spec: KernelSpec, schedule: Schedule, target: Target) -> float:
    """Operations per second of matrix instructions; float32 operands take six products each."""
    gpu = gpu_of(target)
    rate = gpu.matrix8 if spec.compute == "int8" else gpu.matrix16 / (6 if spec.x_dtype == "f32" else 1)
    return rate * MMA_SYNC_SHARE if is_hopper(target) and not uses_wgmma(schedule, target) else rate


def resident_programs(schedule: Schedule, target: Target, shared: int, registers: int) -> int:
    """Programs a multiprocessor runs at once, each with `shared` bytes and `registers` a thread."""
    by_shared = gpu_of(target).shared_sm // max(shared + 1024, 1)
    by_registers = 65536 // (min(registers, 255) * schedule.warps * 32)
    return max(1, min(by_shared, by_registers, 64 // schedule.warps, 16))
