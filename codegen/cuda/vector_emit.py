"""Source text of kernels for vector formats: constants (`T`) over `text/`."""

from __future__ import annotations

import math

from lowbit.codegen.cuda.plan import PREPARE_THREADS
from lowbit.codegen.cuda.vector_plan import VectorPlan

__all__ = ["VECTOR_HEADERS", "vector_traits"]

VECTOR_HEADERS = ("args", "vector_rows", "epilogue", "reduce", "vectors", "halve", "vector_prepare")


def vector_traits(plan: VectorPlan) -> tuple[dict[str, int], dict[str, bool], dict[str, list[int]]]:
    """Numbers, flags and tables (by segment) that the headers use."""
    spec, fmt, s = plan.spec, plan.fmt, plan.schedule
    o = fmt.outliers
    outlier_bits = o.centroids.bit_length() - 1 if o else 0
    # No stages, so no barriers before the last arriver's flag: it is all that BARRIER_BYTES are for.
    numbers = {
        "K": spec.k, "TILE_M": s.tile_m, "TOKEN_TILES": math.ceil(s.tile_m / 8), "WARPS": s.warps,
        "GROUPS_OF_WARPS": s.warps, "STAGES": 0, "BARRIER_BYTES": 16, "DIM": fmt.dim, "PHASES": plan.phases,
        "VECTOR_ROWS": plan.vector_rows, "TILE_ROWS": plan.tile_rows, "ROW_TILES": plan.row_tiles,
        "TILES": plan.tiles, "TILE_SETS": plan.tile_sets, "UNITS": plan.units, "UNITS_PER_SET": plan.units_per_set,
        "TILE_UNITS": plan.tile_units, "UNIT_STEPS": plan.unit_steps, "GROUPS": fmt.groups,
        "GROUP_UNITS": plan.group_units, "GROUP_COLUMNS": plan.group_columns,
        "GROUP_PAD": plan.group_units * plan.run, "COLUMNS": fmt.groups * plan.group_columns,
        "OUTLIERS": plan.outliers, "OUTLIER_PAD": plan.outlier_pad, "OUTLIER_DIM": o.dim if o else 1,
        "OUTLIER_CENTROIDS": o.centroids if o else 1, "OUTLIER_BYTES": 1 if outlier_bits <= 8 else 2,
        "CENTROIDS": fmt.centroids, "INDEX_BYTES": plan.index_bytes, "RESIDUAL": fmt.residual,
        "RESIDUAL_BYTES": max(plan.residual_bytes, 1), "BOOK_BYTES": plan.book_bytes, "RING_BYTES": plan.ring_bytes,
        "REDUCE_STRIDE": plan.reduce_stride, "SEGMENTS": len(spec.segments), "N_OUT": spec.n_out,
        "OUT": ("f16", "bf16", "f32").index(spec.out_dtype), "X": ("f16", "bf16").index(spec.x_dtype),
        "X_COLUMNS": plan.x_columns, "PREPARE_THREADS": PREPARE_THREADS, "BITS": 16,
    }  # fmt: skip
    flags = {
        "BF16": False, "INTEGER": False, "BULK": False, "BOOK_SHARED": not plan.far,
        "GATED": "silu_mul" in spec.epilogue, "BIAS": "bias" in spec.epilogue,
        "RESIDUAL_ADD": "residual" in spec.epilogue, "ORDERED": fmt.ordered, "ROW_NORM": fmt.norm == "row",
        "COLUMN_NORM": fmt.norm == "col",
    }  # fmt: skip
    vectors = [math.ceil(n / fmt.dim) for n in spec.segments]
    others = [math.ceil(n / o.dim) for n in spec.segments] if o else [0]
    tables = {
        "segment_rows": list(spec.segments),
        "segment_start": _starts(list(spec.segments), 1),
        "segment_tile": _starts(vectors, 8),
        "segment_outlier": _starts(others, 8),
    }
    return numbers, flags, tables


def _starts(counts: list[int], unit: int) -> list[int]:
    """Where every segment begins, in units into which each is rounded up."""
    return [sum(math.ceil(n / unit) for n in counts[:i]) for i in range(len(counts))]
