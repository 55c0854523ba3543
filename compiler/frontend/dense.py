"""Quantizing a dense model while torch.compile captures it: `options={"scheme": ...}`."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lowbit.codegen.select import say_once
from lowbit.compiler.errors import RunError
from lowbit.compiler.frontend.fx import module_path, real_tensor
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.methods import make_method
from lowbit.quantizers.scheme import Scheme, load_scheme

__all__ = ["quantize_graph"]

_done: dict[int, tuple[weakref.ref[torch.Tensor], str, QuantLinear]] = {}
"""Layers quantized so far, by the identity of the dense weight: recompilations find them here."""


def data_free(text: str) -> Scheme:
    """The scheme called `text`, with a method that a compilation can run: it has no calibration data.

    `gptq`, which presets use, becomes `rtn` (the same format, values rounded one by one), and that is said once; other
    methods and tuning are refused (LB0572).
    """
    scheme = load_scheme(text)
    if scheme.tune is None and scheme.finetune is None and scheme.method in ("rtn", "gptq"):
        if scheme.method == "gptq":
            say_once(f"{text}: rounded to nearest; gptq needs calibration data, see lowbit.quantize")
        return replace(scheme, method="rtn", options={} if scheme.method == "gptq" else scheme.options)
    raise RunError(
        "LB0572",
        f"scheme {text!r} ({scheme.method}) needs calibration data, which a compilation does not have",
        hint="call lowbit.quantize(model, ...) first, then torch.compile without `scheme`",
    )


def quantize_graph(gm: fx.GraphModule, text: str) -> int:
    """Replace dense linear calls on known weights by quantized ones, in place; returns how many."""
    scheme, count = data_free(text), 0
    for node in list(gm.graph.nodes):
        if node.target is not torch.nn.functional.linear or node.op != "call_function":
            continue
        x, weight, bias = (*node.args, *(node.kwargs.get(n) for n in ("bias",)), None)[:3]
        path = module_path(node)
        fmt = scheme.format_for(path) if path else None
        dense = real_tensor(weight, gm) if isinstance(weight, fx.Node) else None
        if fmt is None or dense is None or dense.dim() != 2:
            continue
        layer = _layer(dense, fmt, scheme, path)
        _replace(gm, node, x, bias, layer, count)
        count += 1
    gm.recompile()
    return count


def _layer(dense: torch.Tensor, fmt: Any, scheme: Scheme, path: str) -> QuantLinear:
    key = f"{fmt} {scheme.method} {sorted(scheme.options.items())}"
    found = _done.get(id(dense))
    if found is not None and found[0]() is dense and found[1] == key:
        return found[2]
    fmt.check(dense.shape[0], dense.shape[1], path)
    method = make_method(scheme.method, scheme.options)
    with torch.no_grad():
        layer = QuantLinear.from_qtensor(method.quantize(dense.detach().float().cpu(), fmt, None).qtensor)
    layer = layer.to(dense.device)
    _done[id(dense)] = (weakref.ref(dense), key, layer)
    return layer


def _replace(gm: fx.GraphModule, node: fx.Node, x: Any, bias: Any, layer: QuantLinear, index: int) -> None:
    inner = layer.inner
    assert inner is not None
    key = inner.spec_key(("bias",) if bias is not None else ())
    with gm.graph.inserting_before(node):
        operands = []
        for i, tensor in enumerate(inner.operands()):
            name = f"lowbit_dense_{index}_{i}"
            gm.register_buffer(name, tensor, persistent=False)
            attribute = gm.graph.get_attr(name)
            attribute.meta["example_value"] = tensor
            operands.append(attribute)
        new = gm.graph.call_function(torch.ops.lowbit.linear.default, (x, operands, bias, None, key))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
