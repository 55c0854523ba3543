"""Rows of rounded activations between two kernels: what they hold, who may have them, and the reference's two sides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.codegen.check import check_kernel, sample_weight
from lowbit.codegen.reference.backend import ReferenceBackend, run_reference
from lowbit.codegen.rounded import ORDER, ROUNDED, RoundedRows
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.compiler.runtime.dispatch import parse_spec
from lowbit.quantizers.formats import parse_activation

PANEL = str(LAYOUTS["panel16"])
FORMATS = ("int8.g64", "int4.g16.asym", "int4.g32.w2.c90", "int8.token", "int8.token.w32", "e4m3.g64", "e2m1.g32",
           "int8.g48.static", "e4m3.token.static")  # fmt: skip


@pytest.mark.parametrize("columns", [1, 16, 100, 192])
@pytest.mark.parametrize("text", FORMATS)
def test_rows_hold_what_rounding_gives(text: str, columns: int) -> None:
    rounding, rng = parse_activation(text), torch.Generator().manual_seed(columns)
    rows, x = RoundedRows(rounding, columns), torch.randn(3, columns, generator=rng)
    x[1] = 0.0
    scales = torch.rand(rounding.groups(columns), generator=rng) if rounding.static else None
    written = rows.write(x, scales)
    assert written.shape == (3, rows.row_bytes)
    assert rows.row_bytes % 16 == 0
    levels, steps = rows.read(written, scales)
    want, want_steps = rounding.round(x, scales)
    assert torch.equal(levels, want)
    assert torch.equal(steps, want_steps)
    assert torch.equal(rows.numbers(written, scales), rounding.apply(x, scales))
    padding = written[:, : rows.level_bytes].unflatten(1, (-1, 16))[:, -1, [c >= (columns - 1) % 16 + 1 for c in ORDER]]
    assert not padding.any()


def test_what_is_no_number_stays_so() -> None:
    rows, x = RoundedRows(parse_activation("int8.g16"), 32), torch.ones(1, 32)
    x[0, 20] = torch.inf
    assert rows.numbers(rows.write(x))[0].isnan().tolist() == [False] * 16 + [True] * 16


def writer(
    activation: str, segments: tuple[int, ...] = (96, 96), epilogue: tuple[str, ...] = ("silu_mul",)
) -> KernelSpec:
    return KernelSpec(
        segments, 64, "int4.g32.sym", PANEL, "float", out_dtype="bf16", epilogue=epilogue, out_activation=activation
    )


def reader(activation: str, fmt: str = "int4.g32.sym", rotate: int = 0) -> KernelSpec:
    compute = "int8" if activation.startswith("int") else "float"
    return KernelSpec((40,), 96, fmt, PANEL, compute, ROUNDED, activation=activation, rotate=rotate)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["int8.g32", "int4.g32.w1.asym", "e4m3.g32", "int8.token.static"])
def test_the_reference_reads_what_it_writes(activation: str) -> None:
    """Two kernels with rows between them are the same numbers as two kernels of which the second rounds."""
    first, second, x = writer(activation), reader(activation), torch.randn(5, 64)
    up, down = sample_weight(first), sample_weight(second, 1)
    if (scale := down.tensors.get("input_scale")) is not None:
        up = replace(up, tensors={**up.tensors, "output_scale": scale})
    rows, numbers = run_reference(first, x, up), run_reference(replace(first, out_activation=""), x, up)
    assert rows.dtype == torch.uint8
    apart = replace(second, x_dtype="bf16")
    assert torch.equal(run_reference(second, rows, down), run_reference(apart, numbers, down))
    for spec in (first, second):  # what every new kernel goes through
        launch = ReferenceBackend().load(None, spec, Schedule())  # type: ignore[arg-type]
        assert check_kernel(spec, launch, Target.parse("ref")) == 0.0


def test_keys_name_rows_only_where_there_are_some() -> None:
    plain, rows = writer(""), writer("int8.g32")
    assert "out_activation" not in plain.key()
    assert parse_spec(rows.key()) == rows
    assert rows.typed("f16").out_dtype == "f16"
    assert reader("int8.g32").typed("f16") == replace(reader("int8.g32"), out_dtype="f16")
    assert (rows.out_width, reader("int8.g32").x_width) == (112, 112)


@pytest.mark.parametrize(
    ("activation", "segments", "why"),
    [("int8.token", (96, 96), "depends on all 96 columns"), ("int8.token.w32", (96, 96), "depends on all"),
     ("int8.g32.w1x16", (96, 96), "16 bits are no bytes"), ("e5m2.g32", (96, 96), "e4m3 does not hold")],
)  # fmt: skip
def test_outputs_that_are_not_rounded(activation: str, segments: tuple[int, ...], why: str) -> None:
    with pytest.raises(KernelError, match=rf"LB0423.*{why}"):
        writer(activation, segments)


def test_several_outputs_are_not_rounded() -> None:
    with pytest.raises(KernelError, match=r"LB0423.*2 matrices have an output each"):
        writer("int8.g32", (96, 64), ())


def test_activations_that_cannot_arrive_rounded() -> None:
    with pytest.raises(KernelError, match=r"LB0422.*order"):
        reader("int8.g32", "int4.g32.sym.perm")
    with pytest.raises(KernelError, match=r"LB0422.*rotated"):
        reader("int8.g32", rotate=32)
    with pytest.raises(KernelError, match=r"LB0422.*not known"):
        replace(reader("int8.g32"), activation="", compute="float")
