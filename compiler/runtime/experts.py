"""Mixture-of-experts layers as one linear layer per expert and projection, so that each is quantized like any other.

transformers holds all experts of a block in parameters of three dimensions. `unstack_experts` puts an `Experts` module
in the place of every such module: its layers are views of the same memory, and have the names checkpoints give them
(`mlp.experts.3.down_proj`). Whoever looks for linear layers finds them, and calibration sees each expert's own tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowbit.compiler.runtime.dispatch import parse_spec
from lowbit.compiler.runtime.grouped import DENSE
from lowbit.compiler.runtime.modules import PackedLinear, QuantLinear
from lowbit.quantizers.hadamard import rotate
from lowbit.quantizers.qtensor import PackedWeight

__all__ = [
    "DOWN",
    "GATE",
    "UP",
    "Experts",
    "Slicing",
    "as_experts",
    "expert_layers",
    "prepare_experts",
    "restore_experts",
    "unstack_experts",
    "unstacked",
]

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"


@dataclass(frozen=True)
class Slicing:
    """Where each expert's layers lie in the stacked parameters.

    gate: `gate_up_proj` holds gate and up, else `up_proj` holds up alone. transposed: matrices are [E, K, N], not
    [E, N, K]. interleaved: rows of gate and up take turns, else all of gate come first.
    """

    gate: bool = True
    transposed: bool = False
    interleaved: bool = False

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of an expert's layers."""
        return (GATE, UP, DOWN) if self.gate else (UP, DOWN)

    def stack(self, layer: str, kind: str = "weight") -> str:
        """Name of the parameter that holds the `kind` (weight or bias) of `layer`."""
        name = "gate_up_proj" if self.gate and layer != DOWN else layer
        return name if kind == "weight" else f"{name}_bias"

    def take(self, stack: Tensor, expert: int, layer: str) -> Tensor:
        """The matrix [N, K], or bias [N], of an expert's layer: a view of the stack."""
        part = stack[expert]
        part = part.T if self.transposed and part.dim() == 2 else part
        if layer == DOWN or not self.gate:
            return part
        if self.interleaved:
            return part[(layer == UP) :: 2]
        half = part.shape[0] // 2
        return part[half:] if layer == UP else part[:half]


class _Expert(nn.Module):
    """The layers of one expert; `Experts` says what is computed with them."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module


@dataclass
class _Stack:
    """One projection of all experts, as operands of `lowbit::grouped_linear`."""

    operands: list[Tensor]
    bias: Tensor | None
    specs: list[str]
    rotate: int = 0


class Experts(nn.Module):
    """Experts of a block: `forward` is that of transformers' experts, (hidden states, chosen experts, their weights).

    Layers are called one by one, so that hooks see what each expert reads, until `prepare` stacks their packed weights;
    from then on all experts of a projection are one operator. active: experts a token goes to.
    """

    def __init__(self, original: nn.Module, active: int) -> None:
        super().__init__()
        old = cast(Any, original)
        self.num_experts, self.active = int(old.num_experts), active
        self.slicing = Slicing(old.has_gate, old.is_transposed, not old.is_concatenated)
        # What is computed between the projections is the original's own code. It is no child: there are no parameters
        # in it, and transformers would want to initialize those of its class.
        self._rule = (_without_parameters(original),)
        if isinstance(act := getattr(original, "act_fn", None), nn.Module):
            self.add_module("act_fn", act)
        self.plain_gate = type(original)._apply_gate.__name__ == "_default_apply_gate"  # type: ignore[attr-defined]
        for index in range(self.num_experts):
            expert = _Expert()
            for layer in self.slicing.layers:
                expert.add_module(layer, self._linear(original, index, layer, old.has_bias))
            self.add_module(str(index), expert)
        self._stacks: dict[str, _Stack] = {}
        self._pairs: dict[str, Tensor] = {}  # operands of gate and up, [E, 2, ...], where they are pairs

    def _linear(self, original: nn.Module, expert: int, layer: str, bias: bool) -> nn.Linear:
        stack = cast(nn.Parameter, original._parameters[self.slicing.stack(layer)])
        weight = self.slicing.take(stack.detach(), expert, layer)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=stack.requires_grad)
        if bias:
            held = cast(nn.Parameter, original._parameters[self.slicing.stack(layer, "bias")])
            linear.bias = nn.Parameter(
                self.slicing.take(held.detach(), expert, layer), requires_grad=held.requires_grad
            )
        return linear

    def layer(self, expert: int, name: str) -> nn.Module:
        """One expert's layer."""
        return cast(nn.Module, getattr(self._modules[str(expert)], name))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[..., H], int [tokens, k], [tokens, k] -> [..., H]."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        if x.device.type == "meta":
            out = self._everywhere(x, top_k_index, top_k_weights)
        elif self._stacks and (torch.compiler.is_compiling() or not self._watched()):
            out = self._grouped(x, top_k_index, top_k_weights)
        else:
            out = self._one_by_one(x, top_k_index, top_k_weights)
        return out.view_as(hidden_states)

    def _watched(self) -> bool:
        """Whether somebody wants to see what single layers read or give."""
        return any(m._forward_pre_hooks or m._forward_hooks for _, _, m in self.layers())

    def layers(self) -> Iterator[tuple[int, str, nn.Module]]:
        """(expert, name, layer) of all layers."""
        for expert in range(self.num_experts):
            for name in self.slicing.layers:
                yield expert, name, self.layer(expert, name)

    def _between(self, project: Callable[[str], Tensor]) -> Tensor:
        """What the down projection reads, from what `project(layer)` gives."""
        rule = cast(Any, self._rule[0])
        if not self.slicing.gate:
            return cast(Tensor, rule.act_fn(project(UP)))
        gate, up = project(GATE), project(UP)
        if self.plain_gate:
            return cast(Tensor, rule.act_fn(gate) * up)
        both = torch.stack((gate, up), -1).flatten(-2) if self.slicing.interleaved else torch.cat((gate, up), -1)
        return cast(Tensor, rule._apply_gate(both))

    def _one_by_one(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            token, place = torch.where(index == expert)
            if token.numel():
                read = x[token]  # one tensor: gate and up share their statistics
                given = self.layer(expert, DOWN)(self._between(lambda n: self.layer(expert, n)(read)))  # noqa: B023
                out.index_add_(0, token, (given * weights[token, place, None]).to(out.dtype))
        return out

    def _everywhere(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """For tracing without values: every expert once. Each layer has a gather of its own, so that the graph does not
        call them siblings on one input, which the operator does not run as one kernel."""
        out = torch.zeros_like(x)
        for expert in range(self.num_experts):
            inner = self._between(lambda n: self.layer(expert, n)(x.index_select(0, index[:, 0])))  # noqa: B023
            out = out + self.layer(expert, DOWN)(inner) * weights[:, :1].to(x.dtype)
        return out

    def _grouped(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        slots = index.reshape(-1)
        order = slots.argsort(stable=True)
        ends = torch.searchsorted(slots[order], torch.arange(self.num_experts, device=x.device), right=True)
        rows = x[order // index.shape[-1]]
        out = self._project(DOWN, self._between(lambda n: self._project(n, rows, ends)), ends)
        out = out * weights.reshape(-1)[order, None]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=x.device))
        return out[back].view(x.shape[0], index.shape[-1], -1).sum(1).to(x.dtype)

    def _project(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        stack = self._stacks[name]
        x = rotate(x, stack.rotate) if stack.rotate else x
        out: Tensor = torch.ops.lowbit.grouped_linear(x, ends, stack.operands, stack.bias, stack.specs)
        return out

    def prepare(self) -> None:
        """Lay the packed weights of all experts side by side, the only copy: the layers become views of it. What is
        not quantized stays where it is."""
        found = {name: _stacked([self.layer(e, name) for e in range(self.num_experts)]) for name in self.slicing.layers}
        self._stacks = {} if None in found.values() else cast("dict[str, _Stack]", found)
        self._pairs = {}

    def pair(self) -> bool:
        """Lay gate and up of each expert one behind the other, still the only copy, where one kernel can then read both
        (see `paired`); whether that is so."""
        gate, up = self._stacks.get(GATE), self._stacks.get(UP)
        if self._pairs or gate is None or up is None or not self.plain_gate:
            return bool(self._pairs)
        same = len(gate.specs) == 1 and gate.specs == up.specs and gate.bias is up.bias is None
        if not same or gate.rotate or up.rotate or not parse_spec(gate.specs[0]).joins_by_rows:
            return False
        for index, operand in enumerate(cast(PackedLinear, cast(QuantLinear, self.layer(0, GATE)).inner)._names):
            whole = torch.stack((gate.operands[index], up.operands[index]), 1)
            for side, (name, stack) in enumerate(((GATE, gate), (UP, up))):
                stack.operands[index] = whole[:, side]
                for expert in range(self.num_experts):
                    layer = cast(QuantLinear, self.layer(expert, name))
                    cast(PackedLinear, layer.inner)._buffers[operand] = whole[expert, side]
            self._pairs[operand] = whole
        return True

    def paired(self, expert: int) -> PackedLinear | None:
        """Gate and up of one expert as one matrix whose kernel gives silu(gate) * up; None where they are no pair."""
        if not self._pairs:
            return None
        gate = cast(PackedLinear, cast(QuantLinear, self.layer(expert, GATE)).inner)
        fmt, layout, segments, k = gate._meta
        tensors = {name: whole[expert].flatten(0, 1) for name, whole in self._pairs.items()}
        packed = PackedWeight(fmt, layout, segments * 2, k, tensors)
        both = PackedLinear(packed, gate.compute, ("silu_mul",), gate.activation, gate.rotate)
        if gate.invariant:
            both.make_invariant()
        return both

    @contextlib.contextmanager
    def separate(self) -> Iterator[None]:
        """Inside, layers are called one by one."""
        held, self._stacks = self._stacks, {}
        try:
            yield
        finally:
            self._stacks = held

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._stacks:  # each layer has moved on its own
            self.prepare()
        return self

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, {self.active} a token"


def _without_parameters(module: nn.Module) -> nn.Module:
    copy = module.__class__.__new__(module.__class__)
    copy.__dict__ = {**module.__dict__, "_parameters": {}}
    return copy


def _stacked(layers: Sequence[nn.Module]) -> _Stack | None:
    """One projection; None where its layers cannot be operands of one operator."""
    if not all(isinstance(m, (QuantLinear, nn.Linear)) for m in layers):
        return None
    biases = [cast("Tensor | None", m.bias) for m in layers]
    bias = None if biases[0] is None else torch.stack([cast(Tensor, b).detach() for b in biases])
    inners = [m.prepare().inner for m in layers if isinstance(m, QuantLinear)]
    packed = cast("list[PackedLinear]", inners)
    turns = {m.rotate if m._rotates_first else 0 for m in packed} | ({0} if len(packed) < len(layers) else set())
    if len(turns) > 1:
        return None
    keys = {m.key for m in packed}
    if len(keys) == 1 and len(packed) == len(layers):
        return _Stack(_join(packed), bias, [keys.pop()], turns.pop())
    operands, specs = [], []
    for layer in layers:
        quantized = isinstance(layer, QuantLinear)
        operands += cast(PackedLinear, layer.inner).operands() if quantized else [cast(Tensor, layer.weight)]
        specs.append(cast(PackedLinear, layer.inner).key if quantized else DENSE)
    return _Stack(operands, bias, specs, turns.pop())


def _join(layers: Sequence[PackedLinear]) -> list[Tensor]:
    """Every operand of all experts in one tensor [E, ...]."""
    whole = []
    for name in layers[0]._names:
        joined = torch.stack([cast(Tensor, layer._buffers[name]) for layer in layers])
        for layer, part in zip(layers, joined.unbind(), strict=True):
            layer._buffers[name] = part
        whole.append(joined)
    return whole


def _is_stacked(module: nn.Module) -> bool:
    """Whether this is a module of transformers' experts interface whose computation is known here."""
    flags = ("num_experts", "has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
    if not all(hasattr(module, name) for name in flags) or isinstance(module, Experts):
        return False
    old = cast(Any, module)
    if old.has_post_expert_norm or old._is_expert_parallel:
        return False
    slicing = Slicing(old.has_gate, old.is_transposed, not old.is_concatenated)
    kinds = ("weight", "bias") if old.has_bias else ("weight",)
    return set(module._parameters) == {slicing.stack(layer, kind) for layer in slicing.layers for kind in kinds}


def as_experts(module: nn.Module) -> Experts | None:
    """A module's experts as linear layers that share its memory, the module itself if it has them already; None where
    it has none that are known."""
    if isinstance(module, Experts):
        return module
    return Experts(module, int(cast(Any, module).num_experts)) if _is_stacked(module) else None


def unstack_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Put `Experts` in the place of every module that stacks experts, sharing its memory; (path, what was there)."""
    config = getattr(model, "config", None)
    found = [(path, module) for path, module in model.named_modules() if _is_stacked(module)]
    for path, module in found:
        own = getattr(module, "config", config)
        active = next((v for n in ("num_experts_per_tok", "top_k_experts") if (v := getattr(own, n, None))), None)
        _set(model, path, Experts(module, int(active or module.num_experts)).train(module.training))
    return found


def restore_experts(model: nn.Module, originals: Sequence[tuple[str, nn.Module]]) -> None:
    """Put back what `unstack_experts` took out, where nothing was quantized or otherwise changed since."""
    for path, original in originals:
        experts = model.get_submodule(path)
        memory = {p.untyped_storage().data_ptr() for p in original._parameters.values() if p is not None}
        held = [getattr(m, "weight", None) for m in expert_layers(experts).values()]
        if all(isinstance(w, nn.Parameter) and w.untyped_storage().data_ptr() in memory for w in held):
            _set(model, path, original)


@contextlib.contextmanager
def unstacked(model: nn.Module) -> Iterator[None]:
    """Inside, experts are linear layers; afterwards those that are still float are what they were."""
    originals = unstack_experts(model)
    try:
        yield
    finally:
        restore_experts(model, originals)
        prepare_experts(model)


def prepare_experts(model: nn.Module) -> None:
    """`Experts.prepare` of all experts of a model."""
    for module in model.modules():
        if isinstance(module, Experts):
            module.prepare()


def expert_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All layers of experts, by path."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            dot = f"{path}." if path else ""
            found |= {f"{dot}{expert}.{name}": layer for expert, name, layer in module.layers()}
    return found


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
