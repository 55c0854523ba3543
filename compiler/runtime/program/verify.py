"""Comparing a program with the model it was made from: the walk that read the model is not trusted."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from lowbit.codegen.library.dequantize import dense_rows
from lowbit.codegen.reference.backend import run_reference
from lowbit.compiler.errors import RunError
from lowbit.compiler.runtime.dispatch import parse_spec
from lowbit.compiler.runtime.experts import Experts
from lowbit.compiler.runtime.kvsim import simulated
from lowbit.compiler.runtime.modules import PackedLinear
from lowbit.compiler.runtime.program.engine import DecoderProgram
from lowbit.compiler.runtime.program.routing import following
from lowbit.quantizers.formats import Format
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["reference_layers", "verify_program"]

_log = logging.getLogger("lowbit")

ROUNDED = "rounded"
TOLERANCE = {"float": 2e-3, "int16": 1e-2, "int8": 0.3, ROUNDED: 2e-2}
"""Largest allowed root-mean-square difference of logits, relative to their spread, by how products are formed; of
layers whose inputs have a format, and so are rounded by the reference too, the difference that some other levels make.
"""
ROUNDING = {"float": 2.0**-13, "int16": 2.0**-15, "int8": 2.0**-8, ROUNDED: 2.0**-15}
"""How far kernels move activations, relative to a token's largest, by how products are formed. Where inputs have a
format it is the order of sums before them, 2**-20 or less, that takes some to another level; farther, more do."""
_SENSITIVE = 4.0  # times what such a movement of all activations does to the logits; and never more than
_MOST = {"float": 0.3, "int16": 0.3, "int8": 0.3, ROUNDED: 0.6}


@contextlib.contextmanager
def reference_layers(model: nn.Module, moved: bool = False) -> Iterator[None]:
    """Quantized layers run on the reference (decoded weights, float32) instead of their kernels.

    moved: their inputs are moved at random, as far as kernels round them.
    """
    layers = [m for m in model.modules() if isinstance(m, PackedLinear)]
    for layer in layers:
        layer.forward = _reference(layer, moved)  # type: ignore[method-assign]
    try:
        with contextlib.ExitStack() as stack:
            for module in model.modules():
                if isinstance(module, Experts):
                    stack.enter_context(module.separate())
            yield
    finally:
        for layer in layers:
            del layer.forward


def _reference(layer: PackedLinear, moved: bool) -> Any:
    spec, rng, kind = parse_spec(layer.key), torch.Generator().manual_seed(1), _kind(layer)

    def forward(
        x: torch.Tensor, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        flat = x.reshape(-1, spec.k)
        if moved:
            far = flat.abs().amax(1, keepdim=True) * ROUNDING[kind]
            if kind == ROUNDED:  # the model's own numbers, which the program has as float32, decide between levels too
                far = far + flat.abs() * torch.finfo(flat.dtype).eps
            flat = flat + far * (2 * torch.rand(flat.shape, generator=rng) - 1).to(flat.dtype)
        rest = None if residual is None else residual.reshape(-1, spec.n_out)
        packed = layer.packed()
        y = run_reference(spec, flat, packed, bias, rest, _decoded(packed))
        return y.to(x.dtype).view(*x.shape[:-1], spec.n_out)

    return forward


def _kind(layer: PackedLinear) -> str:
    """How a layer's products are formed, as the tables above name it."""
    return ROUNDED if parse_spec(layer.key).activation else layer.compute


def _decoded(weight: PackedWeight) -> torch.Tensor | None:
    """float32 [sum(segments), K], columns as stored: the same numbers as the reference's, in a tenth of the time; None
    for formats that only the reference decodes."""
    if not isinstance(weight.fmt, Format) or weight.fmt.channel:
        return None
    dense = torch.cat([dense_rows(weight, i, 0, n) for i, n in enumerate(weight.segments)])
    columns = weight.tensors.get("columns")
    return dense if columns is None else dense[:, columns.long()]


def verify_program(program: DecoderProgram, model: nn.Module, prompt: int = 6, steps: int = 2) -> float:
    """Run a prompt and single tokens through both; returns the relative difference of the logits.

    Raises RunError (LB0565) when it is not rounding: the model does something the program does not. A model may make
    much of rounding (one with weights of two bits that nobody tuned does; SmolLM2-135M's logits differ by 0.3 once a
    single input that is rounded to 8 bits went to its other level): where the difference is beyond what is
    usual, it is compared with what moving the model's own activations as far as kernels round them does to its logits.
    Sparse layers of the model follow the program's choice of experts, which is held to the same limit (see `routing`).
    """
    total = min(prompt + steps, program.context)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, program.spec.vocab, (total,), generator=rng)
    packed_cache = program.spec.packed is not None
    cached = partial(simulated, model, program.spec.cache) if packed_cache else contextlib.nullcontext
    pieces = [*ids[:prompt].split(program.max_tokens), *ids[prompt:].split(1)]
    got, routes = _run(program, [piece for piece in pieces if piece.numel()])

    def logits(moved: bool = False) -> tuple[torch.Tensor, float]:
        with torch.no_grad(), reference_layers(model, moved), cached(), following(model, routes) as off:
            found: torch.Tensor = model(input_ids=ids[None], use_cache=False).logits[0].float()
            return found, max(off, default=0.0)

    want, off = logits()
    spread = (want - want.mean(-1, keepdim=True)).square().mean().sqrt().clamp(min=1e-12)

    def difference(found: torch.Tensor) -> float:
        return float((found - want).square().mean().sqrt() / spread)

    error, what = max((difference(got), "logits"), (off, "router logits"))
    kinds = {_kind(m) for m in model.modules() if isinstance(m, PackedLinear)} or {"float"}
    limit = max(TOLERANCE[kind] for kind in kinds)
    low = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    limit += {torch.bfloat16: 5e-2, torch.float16: 1e-2}.get(low, 0.0)
    if not error <= limit:
        most = max(_MOST[kind] for kind in kinds)
        usual, limit = limit, max(limit, min(most, _SENSITIVE * difference(logits(moved=True)[0])))
        if error <= limit:
            _log.warning("this model makes much of rounding: %s differ by %.2g, usual are %.2g", what, error, usual)
    if not error <= limit:
        raise RunError(
            "LB0565",
            f"the program disagrees with the model: relative difference of {what} {error:.2g} > {limit:.2g}",
            where=type(model).__name__,
            hint="use mode='modules', and report the model's architecture",
        )
    return error


def _run(program: DecoderProgram, steps: list[torch.Tensor]) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """Logits of all tokens of `steps`, and the experts each went to: int64 [tokens, active] by sparse layer."""
    cache = program.new_cache(sum(step.numel() for step in steps))
    logits, routes = [], []
    for step in steps:
        logits.append(program.run(step, cache, keep=step.numel()))
        routes.append(program.routes(step.numel()))
    return torch.cat(logits), {layer: torch.cat([r[layer] for r in routes]) for layer in routes[0]}
