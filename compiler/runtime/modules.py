"""Drop-in modules: `QuantLinear` for `nn.Linear`, on packed weights held once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.compiler import is_compiling

from lowbit.codegen.select import kernel_layout
from lowbit.codegen.spec import Compute, KernelSpec, rounded_products
from lowbit.compiler.errors import FormatError, KernelError, RunError
from lowbit.compiler.ir.target import Target, host_target
from lowbit.compiler.runtime import native_op
from lowbit.compiler.runtime.dispatch import device_target, parse_spec
from lowbit.compiler.runtime.ops import run_packed, unwatched
from lowbit.quantizers.formats import VectorFormat, WeightFormat, parse_activation, sixteen_bit_products
from lowbit.quantizers.hadamard import rotate, split_order
from lowbit.quantizers.qtensor import PackedWeight
from lowbit.quantizers.weights import (
    QWeight,
    from_stored,
    pack_weights,
    stored,
    stored_names,
    stored_shapes,
    unpack_weights,
)

__all__ = [
    "PackedLinear",
    "QuantLinear",
    "check_activation",
    "default_compute",
    "fingerprint",
    "load_matrix",
    "make_invariant",
    "target_compute",
    "with_input_scale",
]


_LINEAR = torch.ops.lowbit.linear.default


def invariant_by_environment() -> bool:
    """Whether `$LOWBIT_BATCH_INVARIANT` is set (not to 0): layers are batch-invariant from the start."""
    return os.environ.get("LOWBIT_BATCH_INVARIANT", "0") not in ("", "0")


def default_compute(fmt: WeightFormat, device: torch.device) -> Compute:
    """How products are formed unless the user says otherwise.

    On CPUs formats of integers, or of integers times a power of two, use 16-bit activations as two int8 digits, which
    is as exact as bfloat16 activations and runs on the byte dot product; elsewhere weights are decoded to floats.
    """
    return target_compute(fmt, device_target(device))


def make_invariant(model: nn.Module) -> nn.Module:
    """Let no layer's result for a token depend, to the bit, on how many other tokens a call has; returns the model."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.prepare()
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.make_invariant()
    from lowbit.compiler.runtime.experts import prepare_experts  # it is built on this module

    prepare_experts(model)  # their operator names the kernels of all experts
    return model


def target_compute(fmt: WeightFormat, target: Target) -> Compute:
    """`default_compute` for a target that need not be here."""
    vector = target.kind == "cpu" and target.arch != "generic"
    return "int16" if vector and sixteen_bit_products(fmt) else "float"


def check_activation(fmt: WeightFormat, n: int, k: int, activation: str, compute: Compute | None = None) -> None:
    """Raise FormatError (LB0243) when [n, k] weights in `fmt` cannot be multiplied with activations in `activation`."""
    if not activation:
        return
    if isinstance(fmt, VectorFormat):
        layout = kernel_layout(fmt, host_target())
        chosen = compute or rounded_products(fmt, k, layout, parse_activation(activation))
        try:
            KernelSpec((n,), k, str(fmt), str(layout), chosen, activation=activation)
        except KernelError as e:
            raise FormatError(
                "LB0243", f"{fmt} weights are not multiplied with activations in {activation}: {e.message}",
                hint="leave the activation format out, or choose a format with one code per weight",
            ) from e  # fmt: skip
        return
    layout = kernel_layout(fmt, host_target())
    with torch.device("cpu"):  # transformers builds layers under a meta device, which tables of levels have no use for
        chosen = compute or rounded_products(fmt, k, layout, parse_activation(activation))
        problem = KernelSpec((n,), k, str(fmt), str(layout), chosen, activation=activation).rounding_problem
    if problem:
        raise FormatError(
            "LB0243", f"{activation} does not fit {fmt} weights: {problem}",
            hint="use one group size for both, or one scale per token; compute='float' runs any, more slowly",
        )  # fmt: skip


def _constant(bias: torch.Tensor | None, residual: torch.Tensor | None) -> bool:
    """Whether neither would make the operator's output one that has a gradient: only the input may."""
    wanted = (bias is not None and bias.requires_grad) or (residual is not None and residual.requires_grad)
    return not wanted or not torch.is_grad_enabled()


def _no_gradient(grad: torch.Tensor) -> None:
    raise RunError(
        "LB0571", "quantized layers have no gradients, and backward() reached one",
        hint="call the model under torch.no_grad() or torch.inference_mode(), and train the model it was made from",
    )  # fmt: skip


class PackedLinear(nn.Module):
    """Packed weights of one or more sibling linear layers, and the kernel call that reads them.

    The packed tensors are the only copy in memory and are never cast when the model's dtype changes. activation: text
    of the ActivationFormat that inputs are rounded to, once for all siblings; static scales are the operand
    `input_scale`. rotate: blocks of this many input columns are rotated first, in the kernel where it can.
    """

    def __init__(
        self, packed: PackedWeight, compute: Compute, epilogue: tuple[str, ...], activation: str = "", rotate: int = 0
    ) -> None:
        super().__init__()
        self._meta = (packed.fmt, packed.layout, packed.segments, packed.k)
        self._names = tuple(packed.tensors)
        for name, tensor in packed.tensors.items():
            self.register_buffer(name, tensor, persistent=False)
        self.compute: Compute = compute
        self.activation, self.rotate = activation, rotate
        self._rotates_first = bool(rotate) and (packed.layout.container != 8 or split_order(rotate)[0] > 1)
        self._specs: dict[tuple[str, ...], str] = {}
        self.invariant = invariant_by_environment()  # see `codegen.invariant`
        self.key = self.spec_key(epilogue)

    def make_invariant(self) -> None:
        """From now on a token's result does not depend, to the bit, on how many other tokens a call has."""
        if not self.invariant:
            self.invariant = True
            self.key = replace(parse_spec(self.key), invariant=True).key()

    def spec_key(self, epilogue: tuple[str, ...]) -> str:
        """The kernel spec with this weight and `epilogue`, as text (dtypes are filled in by the dispatcher)."""
        fmt, layout, segments, k = self._meta
        spec = KernelSpec(segments, k, str(fmt), str(layout), self.compute, epilogue=epilogue)
        rotate = 0 if self._rotates_first else self.rotate
        return replace(spec, activation=self.activation, rotate=rotate, invariant=self.invariant).key()

    @property
    def rotates_first(self) -> bool:
        """Whether torch rotates the input, before the kernel."""
        return self._rotates_first

    def packed(self) -> PackedWeight:
        """The weight as a value."""
        return PackedWeight(*self._meta, dict(zip(self._names, self.operands(), strict=True)))

    def operands(self) -> list[torch.Tensor]:
        """The packed tensors, in the order of `KernelSpec.operands`."""
        buffers: dict[str, Any] = self._buffers  # attributes of modules take far longer to look up
        return list(map(buffers.__getitem__, self._names))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return cast(torch.Tensor, getattr(self, self._names[0])).device

    def forward(
        self, x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[..., K] -> [..., n_out]."""
        x = rotate(x, self.rotate) if self._rotates_first else x
        compiling = is_compiling()
        if not compiling:
            if native_op.direct is not None:
                found = native_op.direct(x, self.operands(), bias, residual, self.key)
                if found is not NotImplemented:
                    return cast(torch.Tensor, found)
            if not (native_op.installed and x.is_cpu and _constant(bias, residual)) and unwatched(x):
                return run_packed(x, self.packed(), bias, residual, self.key)
        out: torch.Tensor = _LINEAR(x, self.operands(), bias, residual, self.key)
        if not compiling and out.requires_grad:
            out.register_hook(_no_gradient)  # the operator alone would end the way back with a warning
        return out

    @property
    def stored_names(self) -> tuple[str, ...]:
        """The names of each matrix's tensors in a checkpoint."""
        return (*stored_names(self._meta[0]), *(("input_scale",) if "input_scale" in self._names else ()))

    def load_stored(self, index: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take a checkpoint's `tensors` (`quantizers.weights.stored`) for matrix `index`, in the memory that is there,
        which experts read too. Raises FormatError (LB0227) when they do not fit."""
        fmt, layout, segments, k = self._meta
        given, held = {name: t.detach().cpu() for name, t in tensors.items()}, self.packed()
        if given["weight_shape"].tolist() != [segments[index], k]:
            raise FormatError("LB0227", f"{fmt} of {segments[index]}x{k}, not {given['weight_shape'].tolist()}")
        weights = unpack_weights(replace(held, tensors={name: t.cpu() for name, t in held.tensors.items()}))
        weights[index] = from_stored(fmt, segments[index], k, given)
        packed = with_input_scale(pack_weights(weights, layout), self.activation, given.get("input_scale"))
        with torch.no_grad():
            for name, value in packed.tensors.items():
                cast(torch.Tensor, self._buffers[name]).copy_(value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        """Move with the model, but keep every dtype: scales are data, not parameters of the model's precision."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self


def load_matrix(
    packed: PackedLinear, index: int, state: Mapping[str, Any], prefix: str, missing: list[str], unexpected: list[str]
) -> None:
    """What `load_state_dict` does for matrix `index` of packed weights, whose tensors `state` has below `prefix`."""
    names = [prefix + name for name in packed.stored_names]
    unexpected[:] = [key for key in unexpected if key not in names]
    absent = [key for key in names if key not in state]
    missing += absent
    if not absent:
        packed.load_stored(index, {key.removeprefix(prefix): state[key] for key in names})


class QuantLinear(nn.Module):
    """A linear layer with weights stored in `fmt`; the drop-in for `nn.Linear`.

    Built empty (shapes only), it has the tensors of a checkpoint as buffers, see `quantizers.weights.stored`.
    `prepare` turns them into the kernel's layout, after which that is the only copy; `state_dict` still gives the
    checkpoint's tensors. activation: text of the ActivationFormat that inputs are rounded to, none when empty; static
    formats have their scales, float32 [groups], in `input_scale`. rotate: blocks of this many input columns are rotated
    first (`quantizers.hadamard.rotate`), as the weights were. compute: how products are formed, see `default_compute`
    when None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        fmt: WeightFormat,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        activation: str = "",
        rotate: int = 0,
        compute: Compute | None = None,
    ) -> None:
        super().__init__()
        fmt.check(out_features, in_features, "QuantLinear")
        check_activation(fmt, out_features, in_features, activation, compute)
        self.activation, self.rotate, self._compute = activation, rotate, compute
        self.in_features, self.out_features, self.fmt = in_features, out_features, fmt
        self._stored = stored_shapes(fmt, out_features, in_features)
        if activation and (rounding := parse_activation(activation)).static:
            self._stored["input_scale"] = (torch.float32, (rounding.groups(in_features),))
        for name, (kind, shape) in self._stored.items():
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.inner: PackedLinear | None = None
        self._prints: dict[str, str] = {}

    @classmethod
    def from_qtensor(
        cls,
        q: QWeight,
        bias: torch.Tensor | None = None,
        *,
        compute: Compute | None = None,
        activation: str = "",
        input_scale: torch.Tensor | None = None,
        rotate: int = 0,
    ) -> QuantLinear:
        """A prepared layer holding `q`. Raises FormatError: LB0241 when scales are missing or superfluous, LB0243."""
        n, k = q.shape
        layer = cls(k, n, q.fmt, bias is not None, "meta", activation=activation, rotate=rotate, compute=compute)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        device = bias.device if bias is not None else torch.device("cpu")
        packed = pack_weights([q], kernel_layout(q.fmt, device_target(device), activation))
        packed = with_input_scale(packed, activation, input_scale)
        layer._adopt(packed)
        return layer

    @property
    def static_scale(self) -> torch.Tensor | None:
        """float32 [groups]: the scales of a static activation format."""
        return self._buffers.get("input_scale") if self.inner is None else self.inner._buffers.get("input_scale")

    def asks(self) -> dict[str, str | int]:
        """What the layer does to its input, for the graph: `activation`, `rotate`, and fingerprints of static `scales`
        and of the `order` of columns; what it does not do is left out."""
        values: dict[str, str | int] = {"activation": self.activation, "rotate": self.rotate, **self._prints}
        return {name: value for name, value in values.items() if value}

    @property
    def prepared(self) -> bool:
        """True once the weights are in the kernel's layout."""
        return self.inner is not None

    def qtensor(self) -> QWeight:
        """The weights in canonical form."""
        if self.inner is not None:
            return unpack_weights(self.inner.packed())[0]
        tensors = {name: cast(torch.Tensor, self._buffers[name]) for name in self._stored}
        return from_stored(self.fmt, self.out_features, self.in_features, tensors)

    def prepare(self) -> QuantLinear:
        """Pack the checkpoint's tensors for this device's kernels and drop them; does nothing the second time."""
        if self.inner is None:
            device = cast(torch.Tensor, self.weight_shape).device
            if device.type == "meta":
                raise FormatError("LB0224", "the layer has no weights yet", hint="load a state dict first")
            cpu = self.cpu() if device.type != "cpu" else self
            packed = pack_weights([cpu.qtensor()], kernel_layout(self.fmt, device_target(device), self.activation))
            packed = with_input_scale(packed, self.activation, self.static_scale)
            self._adopt(packed, device)
        return self

    def _adopt(self, packed: PackedWeight, device: torch.device | None = None) -> None:
        device = device or next(iter(packed.tensors.values())).device
        epilogue = ("bias",) if self.bias is not None else ()
        chosen = self._compute or default_compute(self.fmt, device)
        if self.activation and not self._compute:
            chosen = rounded_products(self.fmt, self.in_features, packed.layout, parse_activation(self.activation))
        self.inner = PackedLinear(packed, chosen, epilogue, self.activation, self.rotate).to(device)
        self._note_operands(self.inner)
        for name in self._stored:
            self._buffers.pop(name, None)

    def _note_operands(self, inner: PackedLinear) -> None:
        """Remember the fingerprints that `asks` gives."""
        names = {"input_scale": "scales"} | ({} if isinstance(self.fmt, VectorFormat) else {"columns": "order"})
        found = {label: inner._buffers.get(name) for name, label in names.items()}
        self._prints = {label: fingerprint(t) for label, t in found.items() if t is not None}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., K] -> [..., N], in x's dtype."""
        inner: Any
        compiling = is_compiling()
        if compiling:
            inner, bias = self.inner, self.bias
        else:  # attributes of modules take far longer to look up
            inner, bias = self._modules.get("inner"), self._parameters.get("bias")
        if inner is None:
            inner = self.prepare().inner
        plain = not compiling and not inner._forward_hooks and not inner._forward_pre_hooks
        out: torch.Tensor = inner.forward(x, bias) if plain else inner(x, bias)  # a call looks for all kinds of hooks
        return out

    def canonical(self) -> dict[str, torch.Tensor]:
        """The checkpoint's tensors by name."""
        if self.inner is None:
            return {name: cast(torch.Tensor, self._buffers[name]) for name in self._stored}
        scale = {} if self.static_scale is None else {"input_scale": self.static_scale}
        return {**stored(self.qtensor()), **scale}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.inner is not None:
            destination.update({prefix + name: value for name, value in self.canonical().items()})

    def _load_from_state_dict(
        self, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str],
        unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)
        if self.inner is not None:
            load_matrix(self.inner, 0, state, prefix, missing, unexpected)
            self._note_operands(self.inner)

    def extra_repr(self) -> str:
        inputs = f", inputs {self.activation}" if self.activation else ""
        return f"{self.in_features}, {self.out_features}, {self.fmt}{inputs}, bias={self.bias is not None}"


def fingerprint(tensor: torch.Tensor) -> str:
    """Short text that is the same for equal tensors; computed once, because graphs are made of values on meta."""
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()[:12]


def with_input_scale(packed: PackedWeight, activation: str, scale: torch.Tensor | None) -> PackedWeight:
    """`packed` with the static scales of `activation` as its last operand; raises FormatError (LB0241) unless they are
    there exactly when the format is static, float32 [groups]."""
    rounding = parse_activation(activation) if activation else None
    shape = (rounding.groups(packed.k),) if rounding is not None and rounding.static else None
    if (None if scale is None else tuple(scale.shape)) != shape:
        raise FormatError(
            "LB0241", f"{activation or 'no activation format'} of {packed.k} columns needs scales {shape}"
        )
    if scale is None:
        return packed
    return replace(packed, tensors={**packed.tensors, "input_scale": scale.detach().float().contiguous()})
