"""Who can load what a run will write: programs that read it as it is, and those that it can be converted for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from lowbit.compiler.errors import LowbitError
from lowbit.compiler.runtime.experts import expert_layers
from lowbit.quantizers.formats import ChoiceFormat, Format, IntElement, WeightFormat, parse_format
from lowbit.quantizers.rewrites import Rotate, Smooth
from lowbit.quantizers.scheme import Scheme

if TYPE_CHECKING:
    from lowbit.compiler.io.native import StoredInput
    from lowbit.compiler.job.plan import LayerPlan

__all__ = ["consumers", "vllm_notes"]


def consumers(chosen: list[LayerPlan], scheme: Scheme, model: nn.Module) -> dict[str, str]:
    """Who can load the result, and who cannot and why. model: without weights."""
    readers = _readers(chosen, scheme, bool(expert_layers(model)))
    return readers | (_converted(chosen, model) if chosen else {})


def _readers(chosen: list[LayerPlan], scheme: Scheme, experts: bool) -> dict[str, str]:
    """Who loads it as it is written."""
    from lowbit.compiler.io import ct_floats
    from lowbit.compiler.io.checkpoint import checkpoint_layout, export_layout

    if experts:
        only = "with `import lowbit` only: experts are written in lowbit's own layout"
        return {"lowbit": "yes", "transformers": only, "vllm": "no: it does not know lowbit's own layout"}
    if any(layer.activation for layer in chosen):
        return _rounding_consumers(chosen, scheme)
    layers = [(x.path, x.n, x.k, parse_format(str(x.format))) for x in chosen]
    native = [path for path, n, k, fmt in layers if export_layout(fmt, n, k) != "compressed-tensors"]
    formats, shapes = {p: fmt for p, _, _, fmt in layers}, {p: (n, k) for p, n, k, _ in layers}
    layout = checkpoint_layout(formats, shapes)
    reasons = vllm_notes(layers)
    if native and not reasons:
        reasons = ["it does not know lowbit's own layout"]
    first = native[0] if native else ""
    narrow = any(isinstance(fmt, Format) and ct_floats.scale_note(fmt, torch.float32) for *_, fmt in layers)
    why = f"with `import lowbit` only: compressed-tensors cannot hold {len(native)} layers, such as {first}"
    if layout == "vptq":
        why = "with the vptq package and a GPU: 4.53 loads VPTQ's layout, 5.23 stops at it"
    return {
        "lowbit": "yes",
        "transformers": why if native else "yes, in bfloat16" if narrow else "yes",
        "vllm": "no: " + "; ".join(reasons) if reasons else "yes",
    }


def _rounding_consumers(chosen: list[LayerPlan], scheme: Scheme) -> dict[str, str]:
    """The same where inputs are rounded: 8 bits both ways is common ground, everything else is lowbit's."""
    from lowbit.compiler.io import ct_rounded
    from lowbit.compiler.io.native import StoredInput

    inputs = {x.path: StoredInput(x.activation) for x in chosen}
    free = all(isinstance(r, Smooth) or (isinstance(r, Rotate) and not r.online) for r in scheme.rewrites)
    if free and ct_rounded.can_hold({x.path: parse_format(str(x.format)) for x in chosen}, inputs):
        return dict.fromkeys(("lowbit", "transformers", "vllm"), "yes")
    first = next(x for x in chosen if x.activation)
    return {
        "lowbit": "yes",
        "transformers": "with `import lowbit` only: inputs are rounded in ways that compressed-tensors does not know",
        "vllm": f"no: it does not know inputs rounded to {first.activation} before {first.format} weights",
    }


def vllm_notes(layers: Iterable[tuple[str, int, int, WeightFormat]]) -> list[str]:
    """Why vLLM's compressed-tensors loader would refuse (path, n, k, format) layers; empty when it takes them."""
    counts: dict[str, int] = {}
    first: dict[str, str] = {}
    for path, _, k, fmt in layers:
        for reason in _vllm_reasons(fmt, k):
            counts[reason] = counts.get(reason, 0) + 1
            first.setdefault(reason, path)
    return [f"{reason} ({count} layers, first {first[reason]})" for reason, count in counts.items()]


def _vllm_reasons(fmt: WeightFormat, k: int) -> list[str]:
    from lowbit.compiler.io import ct_floats

    if isinstance(fmt, ChoiceFormat):
        return [reason for candidate in fmt.candidates for reason in _vllm_reasons(candidate, k)]
    if not isinstance(fmt, Format):
        return ["it has no kernels for vector quantization"]
    if ct_floats.layout_of(fmt):
        return [reason] if (reason := ct_floats.misfit(fmt, k)) else []
    g = fmt.granularity
    if fmt.terms > 1:
        return ["it has no kernels for binary coding"]
    if fmt.element.window > 1:
        return ["it has no kernels for trellises"]
    reasons = ["it has no kernels for float offsets"] if fmt.offset else []
    if not isinstance(fmt.element, IntElement):
        reasons.append(f"it reads integers from this layout, not {fmt.element.name}")
    if fmt.bits not in (4, 8):
        reasons.append(f"it has kernels for 4 and 8 bits, not {fmt.bits}")
    if fmt.scale not in ("f16", "bf16"):
        reasons.append("it wants 16-bit scales")
    if g.kind == "t":
        reasons.append("it wants scales per channel or group")
    if g.kind == "g" and k % g.group:
        reasons.append(f"group {g.group} does not divide {k} input columns")
    elif g.kind == "g" and g.group not in (32, 64, 128):
        reasons.append(f"it has no kernel for groups of {g.group}")
    return reasons


def _converted(chosen: list[LayerPlan], model: nn.Module) -> dict[str, str]:
    """Who loads it in another layout, which `quantize convert` writes bit by bit."""
    from lowbit.compiler.io.misfits import find_misfits
    from lowbit.compiler.io.native import StoredInput

    formats = {x.path: parse_format(str(x.format)) for x in chosen}
    shapes, inputs = {x.path: (x.n, x.k) for x in chosen}, {x.path: StoredInput(x.activation) for x in chosen}
    inputs = {path: given for path, given in inputs.items() if given.to_dict()}
    found = find_misfits("gptq", formats, shapes, inputs, list(expert_layers(model)))
    return {
        "gptqmodel": _after("gptq", next(iter(found.values()), None)),
        "llama.cpp": _after("gguf", _unwritten(formats, shapes, inputs, model)),
    }


def _after(layout: str, why: str | None) -> str:
    return f"no: {why}" if why else f"after `quantize convert --to {layout}`"


def _unwritten(
    formats: Mapping[str, WeightFormat],
    shapes: Mapping[str, tuple[int, int]],
    inputs: Mapping[str, StoredInput],
    model: nn.Module,
) -> str | None:
    """Why the model cannot be a GGUF file, or None; what the numbers of its matrices say is not known before."""
    from lowbit.compiler.io.gguf_model import check_model, check_model_type
    from lowbit.compiler.io.gguf_types import misfit

    try:
        check_model_type(getattr(model.config, "model_type", None), "model")
        check_model(model.config, "model")
    except LowbitError as e:
        return e.message
    if inputs:
        return "inputs are rounded, which a GGUF file cannot say"
    return next((why for path, fmt in formats.items() if (why := misfit(fmt, shapes[path][1]))), None)
