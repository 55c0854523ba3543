"""fold-affine on random graphs: what the graph computes stays the same, and nothing that can be folded is left."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, silu
from xdsl.dialects.builtin import IntegerAttr, ModuleOp
from xdsl.ir import SSAValue

from lowbit.compiler.errors import IRError
from lowbit.compiler.ir import graph as lb
from lowbit.compiler.pipeline import parse_module, run_pipeline
from lowbit.quantizers.hadamard import rotate
from lowbit.quantizers.rewrites.text import graph_edits, parse_step

K = 12
_X = f"tensor<1x?x{K}xf32>"


def random_graph(rng: random.Random) -> str:
    """A chain of norms, layers and activations with scales, permutations and rotations strewn in."""
    lines: list[str] = []

    def emit(text: str) -> str:
        lines.append(f"    %v{len(lines)} = {text}")
        return f"%v{len(lines) - 1}"

    def weight(*shape: int) -> str:
        return emit(f'lb.weight {{names = ["w{len(lines)}"]}} : () -> tensor<{"x".join(map(str, shape))}xf32>')

    def linear(x: str) -> str:
        w = weight(K, K)
        if rng.random() < 0.5:
            return emit(f"lb.linear {x}, {w} : ({_X}, tensor<{K}x{K}xf32>) -> {_X}")
        b = weight(K)
        types = f"({_X}, tensor<{K}x{K}xf32>, tensor<{K}xf32>)"
        return emit(f'lb.linear {x}, {w}, {b} {{epilogue = ["bias"]}} : {types} -> {_X}')

    def step(x: str) -> str:
        kind = rng.randrange(4)
        if kind == 0:
            return emit(f"lb.mul {x}, {weight(K)} : ({_X}, tensor<{K}xf32>) -> {_X}")
        if kind == 1:
            order = ", ".join(f"{i} : i64" for i in rng.sample(range(K), K))
            return emit(f"lb.permute {x} {{order = [{order}]}} : ({_X}) -> {_X}")
        if kind == 2:
            block = rng.choice([2, 4, 12])
            return emit(f"lb.hadamard {x} {{block = #builtin.int<{block}>}} : ({_X}) -> {_X}")
        return x

    def layer(x: str) -> str:
        kind = rng.randrange(4)
        if kind == 0:
            return emit(f"lb.rms_norm {x}, {weight(K)} {{eps = 1.0e-06 : f64}} : ({_X}, tensor<{K}xf32>) -> {_X}")
        if kind == 1:
            pair = f"{step(linear(x))}, {step(linear(x))}"
            return emit(f"lb.silu_mul {pair} : ({_X}, {_X}) -> {_X}")
        if kind == 2:
            return emit(f"lb.gelu {step(linear(x))} : ({_X}) -> {_X}")
        return emit(f"lb.add {step(linear(x))}, {x} : ({_X}, {_X}) -> {_X}")

    x = "%x"
    for _ in range(6):
        x = step(layer(x))
    y = linear(x)
    body = "\n".join(lines)
    head = f'builtin.module {{\n  "lb.graph"() ({{\n  ^bb0(%x: {_X}):\n'
    return head + f'{body}\n    lb.return {y} : ({_X}) -> ()\n  }}) {{sym_name = "m"}} : () -> ()\n}}\n'


def weights_of(module: ModuleOp) -> dict[str, Tensor]:
    """Random values for every weight, vectors away from zero."""
    rng = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for op in [o for o in module.walk() if isinstance(o, lb.Weight)]:
        shape = op.outs[0].type.get_shape()  # type: ignore[union-attr]
        value = torch.randn(shape, generator=rng) / K**0.5
        found[op.names.data[0].data] = value if len(shape) > 1 else 0.5 + torch.rand(shape, generator=rng)
    return found


def evaluate(module: ModuleOp, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """What the graph computes."""
    block = next(o for o in module.walk() if isinstance(o, lb.Graph)).body.block
    values: dict[SSAValue, Tensor] = {block.args[0]: x}
    for op in block.ops:
        a = [values[v] for v in op.operands]
        if isinstance(op, lb.Return):
            return a[0]
        assert isinstance(op, lb.GraphOp)
        values[op.outs[0]] = _run(op, a, weights)
    raise AssertionError("no return")


def _run(op: lb.GraphOp, a: list[Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    if isinstance(op, lb.Weight):
        return weights[op.names.data[0].data]
    if isinstance(op, lb.Linear):
        return torch.nn.functional.linear(*a)
    if isinstance(op, lb.RmsNorm):
        return a[0] * (a[0].square().mean(-1, keepdim=True) + 1e-6).rsqrt() * a[1]
    if isinstance(op, lb.Permute):
        return a[0][..., [i.value.data for i in op.order.data if isinstance(i, IntegerAttr)]]
    if isinstance(op, lb.Hadamard):
        return rotate(a[0], op.block.data)
    plain = {lb.Mul: lambda: a[0] * a[1], lb.Add: lambda: a[0] + a[1], lb.Gelu: lambda: gelu(a[0]),
             lb.SiluMul: lambda: silu(a[0]) * a[1]}  # fmt: skip
    return plain[type(op)]()


@pytest.mark.parametrize("norms", ["", "{norms=true}"])
@pytest.mark.parametrize("seed", range(12))
def test_the_function_stays(seed: int, norms: str) -> None:
    text = random_graph(random.Random(seed))
    before, after = parse_module(text), parse_module(text)
    weights = weights_of(before)
    run_pipeline(after, f"fold-affine{norms}")
    edits = graph_edits(after, weights.__getitem__)
    edited = {**weights, **{name: e.apply(weights[name]) for name, e in edits.tensors.items()}}
    x = torch.randn(1, 5, K, generator=torch.Generator().manual_seed(seed))
    want = evaluate(before, weights, x)
    assert float((evaluate(after, edited, x) - want).abs().max()) < 1e-4 * float(want.abs().max())


def test_nothing_that_can_be_folded_is_left() -> None:
    counts = {"before": 0, "after": 0}
    for seed in range(12):
        module = parse_module(random_graph(random.Random(seed)))
        counts["before"] += _steps(module)
        run_pipeline(module, "fold-affine")
        counts["after"] += _steps(module)
    # What remains stands between a value with two readers, or an activation, and something that cannot take it.
    assert counts["after"] < counts["before"] / 3


def _steps(module: ModuleOp) -> int:
    return sum(isinstance(o, lb.Mul | lb.Permute | lb.Hadamard) for o in module.walk())


def test_shared_weights_are_left_alone() -> None:
    text = f"""builtin.module {{
  "lb.graph"() ({{
  ^bb0(%x: {_X}):
    %w = lb.weight {{names = ["w"]}} : () -> tensor<{K}x{K}xf32>
    %s = lb.weight {{names = ["s"]}} : () -> tensor<{K}xf32>
    %a = lb.linear %x, %w : ({_X}, tensor<{K}x{K}xf32>) -> {_X}
    %m = lb.mul %a, %s : ({_X}, tensor<{K}xf32>) -> {_X}
    %b = lb.linear %m, %w : ({_X}, tensor<{K}x{K}xf32>) -> {_X}
    lb.return %b : ({_X}) -> ()
  }}) {{sym_name = "m"}} : () -> ()
}}"""
    module = parse_module(text)
    run_pipeline(module, "fold-affine")
    assert _steps(module) == 1


@pytest.mark.parametrize("text", ["rows", "rows shear 2", "planes fill 1", "columns order a b", "rows rotate"])
def test_bad_edits_are_refused(text: str) -> None:
    with pytest.raises(IRError, match="LB0313"):
        parse_step(text, lambda name: torch.ones(1))
