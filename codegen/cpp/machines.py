"""What kernels' schedules and predicted times know of the machines behind instruction sets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

__all__ = [
    "BF16_ARCHES",
    "LUT_ARCHES",
    "MACHINES",
    "SHORT_ARCHES",
    "SIGN_ARCHES",
    "VBMI_ARCHES",
    "WHOLE_ARCHES",
    "WORD_ARCHES",
    "Machine",
]


@dataclass(frozen=True)
class Machine:
    """Assumed speed of one core.

    ghz: clock under vector load. bandwidth: GB/s from memory with four or more streams. ops, loads: vector operations
    and loads a cycle, in 64-byte units. dot: operations one dot product of bytes takes; word: one of 16-bit numbers;
    fma: one fused multiply-add of a kernel for many tokens. overlap: what the shorter of waiting for memory and
    computing adds to the other in kernels for few tokens (with `halves` in those that look sums up). end: operations
    that bring the sums of a chunk to the result. unpack: operations that take one vector's codes out of a plane. sums:
    running sums that fit in registers beside what decoding needs. full: byte dot products take one instruction, with
    unsigned bytes of any size. halves: a 64-byte vector is two registers, of which there are 16; byte dot products that
    are not full take twice as many operations with bytes above 127. ahead: bytes that direct kernels fetch ahead, all
    panels together, but at least 1024 in each; far: they go into the second-level cache instead, and how many depends
    on the format; decode_ahead: those that decoding into a buffer fetches ahead. lookup: time of loading a centroid of
    bytes, beside Cascade Lake's. held: registers that a running sum of words takes with what making words needs. bf16:
    operations that one dot product of pairs of bfloat16 numbers takes.
    """

    ghz: float
    bandwidth: float
    ops: float
    loads: float
    dot: float
    word: float
    sums: int
    full: bool = False
    halves: bool = False
    fma: float = 2.0
    overlap: float = 0.56
    end: float = 4.4
    unpack: float = 1.7
    ahead: int = 1024
    far: bool = False
    decode_ahead: int = 0
    lookup: float = 1.0
    held: int = 1
    bf16: float = 0.0


_ZEN3 = partial(
    Machine,
    3.2,
    22.5,
    1.52,
    1.0,
    sums=4,
    halves=True,
    fma=2.5,
    overlap=0.5,
    end=6.0,
    unpack=1.2,
    ahead=4096,
    decode_ahead=2048,
)
# Measured on Zen 4 cores, whose units are half as wide; their neighbours keep them from 3.7 GHz.
_ZEN4 = Machine(
    3.4, 26.0, 2.0, 1.0, 2.0, 2.1, 16, True, fma=2.4, overlap=0.15, end=7.8, unpack=0.3, far=True, lookup=0.5
)
MACHINES = {
    "avx512bf16": replace(_ZEN4, bf16=1.95),
    "avx512vbmi": _ZEN4,
    # Measured on Cascade Lake cores with one 512-bit multiplier; others have two.
    "avx512vnni": Machine(3.1, 13.0, 2.0, 2.0, 1.8, 1.8, 16, True, held=2),
    "avx512": Machine(3.1, 13.0, 2.0, 2.0, 5.0, 5.0, 16, held=2),
    # Measured on Zen 3 cores.
    "avx2": _ZEN3(dot=2.7, word=2.3),
    # The same cores' numbers with the dot products of VNNI, counted.
    "avx2vnni": _ZEN3(dot=1.0, word=1.3, full=True),
    # Two or four 16-byte pipes; not measured.
    "neondot": Machine(2.8, 12.0, 0.75, 0.5, 1.0, 4.0, 4),
    "neon": Machine(2.8, 12.0, 0.75, 0.5, 6.0, 4.0, 4),
    "generic": Machine(3.0, 12.0, 0.5, 0.5, 24.0, 24.0, 2),
}
SHORT_ARCHES = ("avx512", "avx2")
"""Instruction sets whose byte dot products are sums of two steps, the first of 16-bit numbers."""
VBMI_ARCHES = ("avx512bf16", "avx512vbmi")
"""Instruction sets with permutes of bytes (and measured on Zen 4)."""
BF16_ARCHES = ("avx512bf16",)
"""Instruction sets with dot products of bfloat16 numbers."""
WORD_ARCHES = ("avx512bf16", "avx512vbmi", "avx512vnni", "avx512", "avx2vnni", "avx2")
"""Instruction sets with dot products of 16-bit numbers."""
LUT_ARCHES = ("avx2vnni", "avx2")
"""Instruction sets with the lookups of `text/lut_avx2.h`."""
SIGN_ARCHES = ("avx2vnni", "avx2")
"""Instruction sets with `signed_as`, which negates bytes by the signs of others."""
WHOLE_ARCHES = ("avx2vnni", "avx2")
"""Instruction sets for which codes are packed whole (see `compiler.ir.layout`): others put planes together with logic
of three operands, and nobody measured them with whole codes."""
