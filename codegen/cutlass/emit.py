"""Text of a kernel's module: its numbers as constants, its decode function, then the texts in `text/`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from lowbit.codegen.cuda.bits import half_of
from lowbit.codegen.cuda.fragments import TILE
from lowbit.codegen.cutlass.places import side_places, word_places
from lowbit.codegen.cutlass.plan import Plan
from lowbit.codegen.cutlass.printing import decode_text

__all__ = ["emit_text"]

_BEGIN = """import json
import sys

import cutlass
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint16, Uint32, cute
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.cute.nvgpu.warp import MmaF16BF16Op
from cutlass.cute.runtime import make_fake_stream, make_ptr
"""


def emit_text(plan: Plan) -> str:
    """A module that, run with a file's name, compiles the kernel into that file."""
    texts = ["common", "finish", "wgmma" if plan.warpgroup else "mma", "main"]
    numbers = [f"{name} = {value!r}" for name, value in _numbers(plan).items()]
    parts = [f"# Kernel {plan.spec.digest()}.\n{_BEGIN}", "\n".join(numbers), _text(texts[0])]
    parts += ["\n".join(decode_text(plan.recipe.sequence)) + "\n", *map(_text, texts[1:])]
    return "\n\n".join(parts)


@cache
def _text(name: str) -> str:
    return (Path(__file__).parent / "text" / f"{name}.cute").read_text()


def _numbers(plan: Plan) -> dict[str, object]:
    """Every constant that the texts use."""
    spec, s, recipe, side = plan.spec, plan.schedule, plan.recipe, side_places(plan.spec.layout_)
    words = [word_places(spec.layout_, bits) for bits in plan.planes]
    return {
        "X": plan.dtype, "OUT": spec.out_dtype, "SIDE": spec.scale_dtype, "WARPS": s.warps, "PARTS": plan.parts,
        "TOKENS": s.tile_m, "STAGES": s.stages, "STEPS": plan.k_blocks, "TILES": plan.tiles, "RESIDENT": plan.resident,
        "TILE_SETS": plan.tile_sets, "OUT_TILES": plan.tiles // (2 if plan.gated else 1), "OUT_ROWS": plan.out_rows,
        "GATED": plan.gated, "BIAS": "bias" in spec.epilogue, "RESIDUAL": "residual" in spec.epilogue,
        "PLANE_BITS": plan.planes, "PLACES": tuple((p.block, p.part, p.lane) for p in words),
        "SIDE_PART": side.part, "SIDE_G": side.g, "GROUPS": spec.groups, "GROUP": plan.padded_group,
        "SPAN": plan.span, "SCALED": plan.scaled, "ZERO": spec.fmt.zero, "OFFSET": spec.fmt.offset,
        "TENSOR_SCALE": plan.whole_scales, "X_COLUMNS": plan.x_columns, "N_OUT": spec.n_out, "WIDE": plan.wide,
        "SEGMENT_ROWS": spec.segments, "SEGMENT_START": _starts(spec.segments, 1),
        "SEGMENT_TILE": _starts(spec.segments, TILE), "TABLE_AT": plan.table_at, "SHARED": plan.shared_bytes,
        "TABLE": tuple(half_of(v, plan.dtype) for v in recipe.table), "FACTOR": recipe.factor,
        "FACTOR_BITS": half_of(recipe.factor, plan.dtype) * 0x00010001, "ADDEND": recipe.addend,
        "ADDEND_BITS": tuple(half_of(v, plan.dtype) * 0x00010001 for v in recipe.addend),
    }  # fmt: skip


def _starts(segments: Sequence[int], unit: int) -> tuple[int, ...]:
    """Where every segment begins, in units into which each is rounded up."""
    counts = [math.ceil(n / unit) for n in segments]
    return tuple(sum(counts[:i]) for i in range(len(counts)))
