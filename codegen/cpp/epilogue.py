"""The end of a kernel: what happens to finished sums on their way to the output."""

from __future__ import annotations

from lowbit.codegen.cpp.plan import KernelPlan
from lowbit.codegen.cpp.sides import indent

__all__ = ["put_text"]


def put_text(plan: KernelPlan, value: str) -> str:
    """`put(a, t, column, y, n)`, or `put(a, t, column, gate, up, n)`: finish `n` neighbouring results of token `t`.

    value: C++ expression of a finished sum, with `{y}` for the sum itself and `{row}` for its weight row.
    """
    return _silu(plan, value) if plan.silu else _plain(plan, value)


def _plain(plan: KernelPlan, value: str) -> str:
    lines = [
        "LB_INLINE void put(const Args& a, int64_t t, int64_t column, const float* y, int n) {",
        "OT* out = (OT*)a.out + t * kOut + column;",
        "for (int i = 0; i < n; ++i) {",
        f"float v = {value.format(y='y[i]', row='column + i')};",
        *_steps(plan),
        "out[i] = to_out(v);",
        "}",
        "}",
    ]
    return indent(lines)


def _steps(plan: KernelPlan) -> list[str]:
    """Bias and residual in the order of the spec."""
    text = {
        "bias": "v += a.bias[column + i];",
        "residual": "v += from_out(((const OT*)a.residual)[t * kOut + column + i]);",
    }
    return [text[step] for step in plan.spec.epilogue if step in text]


def _silu(plan: KernelPlan, value: str) -> str:
    bias = "bias" in plan.spec.epilogue
    gate, up = value.format(y="gate[i]", row="column + i"), value.format(y="up[i]", row="kOut + column + i")
    lines = [
        "LB_INLINE void put(const Args& a, int64_t t, int64_t column, const float* gate, const float* up, int n) {",
        "OT* out = (OT*)a.out + t * kOut + column;",
        "for (int i = 0; i < n; ++i) {",
        f"float g = {gate}{' + a.bias[column + i]' if bias else ''};",
        f"float u = {up}{' + a.bias[kOut + column + i]' if bias else ''};",
        "float v = lb_silu(g) * u;",
        *(s for s in _steps(plan) if "residual" in s),
        "out[i] = to_out(v);",
        "}",
        "}",
    ]
    return indent(lines)
