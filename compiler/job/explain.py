"""`quantize explain`: what `torch.compile(model, backend="lowbit")` makes of a model, without running it.

The model's graphs are captured and go through the compiler's passes; nothing is computed and no kernel is built. A
model that is not quantized yet gets empty layers in the formats a scheme would give it: what is fused depends on shapes
and formats, not on values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

from lowbit.codegen.select import candidates
from lowbit.compiler.errors import LowbitError, RunError
from lowbit.compiler.frontend import dynamo
from lowbit.compiler.frontend.fx import value_of
from lowbit.compiler.ir.target import host_target
from lowbit.compiler.job.blocks import linears_in
from lowbit.compiler.job.kept import kept_matrices
from lowbit.compiler.job.models import AnyModel
from lowbit.compiler.runtime.dispatch import parse_spec
from lowbit.compiler.runtime.experts import Experts, prepare_experts
from lowbit.compiler.runtime.modules import PackedLinear, QuantLinear
from lowbit.quantizers.formats import ChoiceFormat, Format, VectorFormat, WeightFormat
from lowbit.quantizers.scheme import Scheme
from lowbit.quantizers.weights import random_weight

__all__ = ["Explanation", "explain_model", "layered"]


@dataclass(frozen=True)
class Explanation:
    """graphs: how many torch captured. breaks: why it could not capture one. kernels: calls of quantized kernels.
    microseconds: predicted by the cost model for them, one token. fused, kept, left: as in `GraphReport`. program: why
    `mode="program"` does not take the model, None when it does. notes: matrices that no scheme quantizes."""

    graphs: int
    kernels: int
    microseconds: float
    breaks: list[str] = field(default_factory=list)
    fused: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    program: str | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def layered(found: AnyModel, scheme: Scheme) -> nn.Module:
    """The model to explain: a quantized checkpoint as it is, another one with empty layers in the scheme's formats."""
    if found.source is None:
        return found.load()
    model, stored = found.source.empty_model(), set(found.source.names())
    for path, linear in linears_in(model, "").items():
        if f"{path}.weight" in stored and (fmt := scheme.format_for(path)) is not None:
            parent, _, name = path.rpartition(".")
            layer = _empty_layer(linear, fmt, str(scheme.activation_for(path) or ""))
            setattr(model.get_submodule(parent), name, layer.prepare())
    prepare_experts(model)
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.device.type == "meta":
                setattr(module, name, nn.Parameter(torch.zeros_like(p, device="cpu"), requires_grad=False))
    model.tie_weights()  # type: ignore[operator]
    return model


def _empty_layer(linear: nn.Linear, fmt: WeightFormat, activation: str) -> QuantLinear:
    """A layer of the shape of `linear` in `fmt`, in the first of several; what it holds means nothing."""
    fmt = fmt.candidates[0] if isinstance(fmt, ChoiceFormat) else fmt
    n, k = linear.out_features, linear.in_features
    fmt.check(n, k, "explain")
    if isinstance(fmt, VectorFormat) or (isinstance(fmt, Format) and fmt.ordered):
        # Zeros are no order of columns.
        bias = None if linear.bias is None else torch.zeros(n)
        return QuantLinear.from_qtensor(random_weight(fmt, n, k, torch.Generator().manual_seed(0)), bias)
    return QuantLinear(k, n, fmt, linear.bias is not None, activation=activation)


def explain_model(model: nn.Module, tokens: int = 16, **inputs: Any) -> Explanation:
    """Capture one call of `model` with `tokens` token ids, or with `inputs`, and say what the compiler does.

    Raises RunError (LB0577) when torch cannot capture it at all.
    """
    call = inputs or {"input_ids": torch.ones(1, tokens, dtype=torch.int64), "use_cache": False}
    torch._dynamo.reset()
    counters.clear()
    before = len(dynamo.reports())
    try:
        with torch.no_grad():
            torch.compile(model, backend=_capture)(**call)
    except LowbitError:
        raise
    except Exception as e:
        cause = next((c for c in (e, e.__cause__, e.__context__) if isinstance(c, LowbitError)), e)
        raise RunError("LB0577", f"torch cannot capture the model: {' '.join(str(cause).split())[:400]}") from e
    finally:
        torch._dynamo.reset()
    reports = dynamo.reports()[before:]
    return Explanation(
        graphs=len(reports),
        kernels=sum(r.kernels for r in reports),
        microseconds=round(1e6 * _predicted(model), 1),
        breaks=[" ".join(why.split()) for why in counters["graph_break"]],
        **{name: alike(line for r in reports for line in getattr(r, name)) for name in ("fused", "kept", "left")},
        program=_program(model),
        notes=list(kept_matrices(model)),
    )


def _capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """The backend without its kernels: a compiled graph returns zeros of the right shapes."""
    dynamo.compile_graph(gm, example_inputs, dynamo.Options(rest="eager"), dynamo.passes())
    (outputs,) = next(n for n in gm.graph.nodes if n.op == "output").args
    return lambda *args: tuple(_empty(n) for n in outputs)


def _empty(node: Any) -> Any:
    value = value_of(node) if isinstance(node, fx.Node) else node
    if not isinstance(value, Tensor):
        return int(value) if isinstance(value, torch.SymInt) else value
    return torch.zeros([int(d) for d in value.shape], dtype=value.dtype, device=value.device)


def _predicted(model: nn.Module) -> float:
    """Seconds of all kernels for one token, by the cost model; kernels that only the reference runs count nothing."""
    total, counts = 0.0, dict[str, float]()
    experts = [m for m in model.modules() if isinstance(m, Experts)]
    awake = {id(layer): m.active / m.num_experts for m in experts for layer in m.modules()}
    for layer in (m for m in model.modules() if isinstance(m, PackedLinear)):
        counts[layer.key] = counts.get(layer.key, 0.0) + awake.get(id(layer), 1.0)
    for key, count in counts.items():
        seconds, backend, _ = candidates(parse_spec(key), host_target(), 1)[0]
        total += count * seconds if backend.name != "reference" else 0.0
    return total


def _program(model: nn.Module) -> str | None:
    from lowbit.compiler.runtime.program import check_program  # transformers is imported there

    try:
        check_program(model)
    except LowbitError as e:
        return e.render()
    return None


_BLOCK = re.compile(r"(?<=\.)\d+(?=\.)")


def alike(lines: Iterable[str]) -> list[str]:
    """Lines that differ only in the number of the block, once, with how many there are."""
    counts = Counter(_BLOCK.sub("*", line) for line in lines)
    return [line if n == 1 else f"{line} ({n} times)" for line, n in counts.items()]
