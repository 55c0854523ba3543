"""Random graphs print, parse and print the same; invalid ones are refused with their place in the model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xdsl.dialects.builtin import ArrayAttr, ModuleOp, StringAttr, f32
from xdsl.ir import Block, Region, SSAValue

from lowbit.codegen.spec import COMPUTE, KernelSpec
from lowbit.compiler.errors import IRError
from lowbit.compiler.ir import graph as lb
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.text import parse_module, print_module, verify_module
from lowbit.compiler.ir.types import QType, tensor
from lowbit.passes.lower_kernels import kernel_op, spec_of
from lowbit.quantizers.formats import Format, catalog, parse_format

FORMATS = [
    *(str(f) for f in catalog()),
    "bcq3.g64.e8m0",
    "tcq2.g64",
    "vq.d4.k256",
    "vq.d8.k4096.r256.c2.o4v4k16.cn",
    "vq.d8.k256.r256.in.rn",
]
WIDTHS = st.sampled_from([16, 33, 64])


@st.composite
def graphs(draw: st.DrawFn) -> ModuleOp:
    """A random, valid graph of linears, elementwise operations and opaque calls."""
    start = draw(WIDTHS)
    block = Block(arg_types=[tensor((1, None, start), f32)])
    values: list[tuple[SSAValue, int]] = [(block.args[0], start)]
    for i in range(draw(st.integers(1, 12))):
        x, width = values[draw(st.integers(0, len(values) - 1))]
        kind = draw(st.sampled_from(["linear", "silu", "add", "opaque", "split"]))
        path = draw(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=8))
        if kind == "linear":
            n = draw(WIDTHS)
            layout = draw(st.sampled_from(["", *LAYOUTS]))
            w = lb.Weight.of([f"{i}.weight"], QType.get(n, width, draw(st.sampled_from(FORMATS)), layout))
            block.add_op(lb.at(w, path))
            op: lb.GraphOp = lb.Linear([x, w.outs[0]], [tensor((1, None, n), f32)])
        elif kind == "silu":
            op = lb.Silu([x], [x.type])
        elif kind == "add":
            op = lb.Add([x, x], [x.type])
        elif kind == "split" and width > 7:
            op = lb.Split([x], [tensor((1, None, 7), f32), tensor((1, None, width - 7), f32)])
        else:
            op = lb.Opaque([x], [x.type], {"call": StringAttr(ascii(path))})
        block.add_op(lb.at(op, path) if draw(st.booleans()) else op)
        values += [(out, out.type.get_shape()[-1]) for out in op.outs]
    block.add_op(lb.Return([values[-1][0]], []))
    return ModuleOp([lb.Graph("g", Region(block))])


@given(graphs())
def test_random_graphs_round_trip(module: ModuleOp) -> None:
    verify_module(module)
    text = print_module(module)
    again = parse_module(text)
    assert print_module(again) == text
    assert [lb.path_of(op) for op in again.walk()] == [lb.path_of(op) for op in module.walk()]


@given(
    st.sampled_from(FORMATS),
    st.sampled_from(COMPUTE),
    st.sampled_from([(), ("bias",), ("silu_mul",), ("bias", "residual")]),
    st.sampled_from(["f32", "bf16", "f16"]),
)
def test_kernels_round_trip_to_their_spec(fmt: str, compute: str, epilogue: tuple[str, ...], dtype: str) -> None:
    weight = parse_format(fmt)
    if not isinstance(weight, Format) or not weight.element.integer:
        compute = "float"
    spec = KernelSpec(
        (32, 32),
        64,
        fmt,
        str(LAYOUTS["vectors8" if fmt.startswith("vq") else "panel16"]),
        compute,
        dtype,
        dtype,
        epilogue,
    )  # type: ignore[arg-type]
    module = ModuleOp([kernel_op("k_test", spec)])
    text = print_module(module)
    again = parse_module(text)
    assert print_module(again) == text
    assert spec_of(again.body.block.first_op) == spec  # type: ignore[arg-type]


def linear_module(n: int, k: int, result: int) -> ModuleOp:
    block = Block(arg_types=[tensor((1, None, 64), f32)])
    w = lb.Weight.of(["w"], QType.get(n, k, "int4.g32.sym"))
    y = lb.Linear([block.args[0], w.outs[0]], [tensor((1, None, result), f32)])
    block.add_ops([w, lb.at(y, "layers.3.mlp.up_proj"), lb.Return([y.outs[0]], [])])
    return ModuleOp([lb.Graph("g", Region(block))])


def test_shape_errors_name_the_module_path() -> None:
    with pytest.raises(IRError, match=r"LB0302.*layers\.3\.mlp\.up_proj.*input columns differ"):
        verify_module(linear_module(32, 65, 32))
    with pytest.raises(IRError, match=r"gives 1x\?x32, but its type says 1x\?x31"):
        verify_module(linear_module(32, 64, 31))


def test_all_problems_are_listed_and_the_pass_is_named() -> None:
    a, b = linear_module(32, 65, 32), linear_module(32, 64, 31)
    both = ModuleOp([op.clone() for m in (a, b) for op in m.body.block.ops])
    with pytest.raises(IRError, match=r"3 invalid operations after pass broken"):
        verify_module(both, after="broken")


@pytest.mark.parametrize(
    "text",
    [
        "builtin.module {",
        "builtin.module { %0 = lb.nothing : () -> tensor<1xf32> }",
        'builtin.module { %0 = lb.weight {names = ["a"]} : () -> !lb.q<0x4, "int4"> }',
        'builtin.module { %0 = lb.weight {names = ["a"]} : () -> !lb.q<4x4, "int4", "nowhere"> }',
        'builtin.module { %0 = lb.weight {names = []} : () -> !lb.q<4x4, "int4"> }',
    ],
)
def test_bad_text_is_one_error(text: str) -> None:
    with pytest.raises(IRError, match="LB030"):
        parse_module(text)


def test_names_are_data() -> None:
    names = ArrayAttr([StringAttr('x"\n*/ #include <evil>')])
    w = lb.Weight([], [QType.get(16, 32, "int4.g32.sym")], {"names": names})
    text = print_module(ModuleOp([w]))
    assert print_module(parse_module(text)) == text
