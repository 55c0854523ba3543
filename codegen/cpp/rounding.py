"""Activations of scalar formats on their way to a kernel: order, rotation, and rounding to a format of their own.

What a spec asks for becomes macros and constants of `text/scalar_rows.h`.
"""

from __future__ import annotations

import struct

from lowbit.codegen.spec import KernelSpec
from lowbit.quantizers.formats import FloatElement
from lowbit.quantizers.formats.activation import WIDE_TOPS

__all__ = ["extra_columns", "rounding_macros", "rounding_problem", "rounding_types"]

_DIGIT_TOPS = {1: WIDE_TOPS[8], 2: WIDE_TOPS[16]}
"""The largest number of one or two int8 digits."""


def rounding_problem(spec: KernelSpec) -> str | None:
    """Why the C++ kernels cannot prepare a spec's activations, or None."""
    if spec.rotate & (spec.rotate - 1) or (spec.rotate and spec.k % spec.rotate):
        return f"rotates blocks of a power of two that divides {spec.k} columns, not of {spec.rotate}"
    element = spec.rounding.element if spec.rounding else None
    if isinstance(element, FloatElement) and not element.mantissa:
        return f"rounds to floats with mantissa bits, not to {element.name}"
    return spec.rounding_problem


def rounding_macros(spec: KernelSpec) -> dict[str, int]:
    """LB_RMS: rows go through a norm first. LB_ROTATE: columns of a rotated block. LB_ROUND: 1 or 2 to round products'
    floats to integers or small floats. LB_STATIC: scales are an operand. LB_SATURATE: values can lie beyond the levels.
    LB_ASYM: levels cover a group's range.
    """
    rounding = spec.rounding
    by_value = rounding is not None and spec.compute == "float"
    return {
        "LB_RMS": int(spec.norm_eps > 0),
        "LB_ROTATE": spec.rotate,
        "LB_ROUND": 0 if rounding is None or not by_value else 1 if rounding.integer else 2,
        "LB_STATIC": int(rounding is not None and rounding.static),
        "LB_SATURATE": int(rounding is not None and rounding.saturates),
        "LB_ASYM": int(rounding is not None and rounding.asym),
    }


def extra_columns(spec: KernelSpec) -> int:
    """Columns of scratch that a row needs before it is packed."""
    macros = rounding_macros(spec)
    return spec.k * (bool(macros["LB_ROTATE"]) + bool(macros["LB_ROUND"]))


def rounding_types(spec: KernelSpec) -> list[str]:
    """Constants and small functions: groups of activations, their largest levels, the order of columns."""
    rounding = spec.rounding
    top, wide, clip, below, highest, lead = _DIGIT_TOPS.get(spec.limbs, 0.0), 0, 1.0, 0.0, 0.0, 0
    if rounding is not None:
        top, clip, below = rounding.top, rounding.clip, float(rounding.integer)
        wide, highest, lead = rounding.wide, WIDE_TOPS[rounding.wide_bits], min(rounding.lead, spec.k)
        wide = int(lead > 0) if rounding.lead else wide
    column = "a.columns[i]" if "columns" in spec.operands else "i"
    lead_chunks = spec.lead_blocks and spec.lead_blocks // spec.chunk_blocks
    lines = [
        f"[[maybe_unused]] constexpr int64_t kSpanChunks = {spec.span_chunks}, kLeadColumns = {lead};",
        f"[[maybe_unused]] constexpr int64_t kLeadChunks = {lead_chunks};",
        f"[[maybe_unused]] constexpr float kClip = {_single(clip)}, kBelow = {below.hex()}f;",
        f"[[maybe_unused]] constexpr float kNormEps = {_single(spec.norm_eps)};",
        f"[[maybe_unused]] constexpr float kRotateUnit = {_single(spec.rotate**-0.5 if spec.rotate else 1.0)};",
        f"[[maybe_unused]] constexpr int64_t kWideGroups = {wide};",
        "[[maybe_unused]] LB_INLINE float top_of(int64_t g) {",
        f"return g < kWideGroups ? {highest.hex()}f : {_single(top)};",
        "}",
        "[[maybe_unused]] LB_INLINE int64_t stored_column([[maybe_unused]] const Args& a, int64_t i) {",
        f"return {column};",
        "}",
    ]
    if rounding is not None:
        lines.append(f"[[maybe_unused]] constexpr int64_t kRoundCols = {rounding.group_size(spec.k)};")
    if rounding is not None and isinstance(element := rounding.element, FloatElement):
        least = struct.unpack("<I", struct.pack("<f", 2.0 ** (1 - element.exponent_bias)))[0]
        lines.append(f"[[maybe_unused]] constexpr uint32_t kLeastBits = {least}u, kMantissa = {element.mantissa};")
    return lines


def _single(value: float) -> str:
    """A float literal: `value` rounded to float32, as torch rounds it."""
    return f"{struct.unpack('<f', struct.pack('<f', value))[0].hex()}f"
