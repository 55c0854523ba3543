"""What a decoder is made of: a walk over a transformers model that refuses what the program does not do.

The walk recognises Llama's structure by names and checks every child, so that an unknown part is an error here; what
it reads is then compared with the model numerically (see `verify`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn

from lowbit.codegen.cpp.decoder.spec import Activation, DecoderSpec
from lowbit.compiler.errors import RunError
from lowbit.compiler.runtime.embedding import QuantEmbedding
from lowbit.compiler.runtime.fused import QuantGatedMLP, SiblingLinear
from lowbit.compiler.runtime.modules import PackedLinear, QuantLinear

__all__ = ["DecoderParts", "LayerParts", "LinearPart", "read_decoder"]

_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
}  # fmt: skip
_FIXED_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}
"""Kinds of rotary positions whose table does not depend on the length of the text."""


@dataclass(frozen=True)
class LinearPart:
    """One matrix: packed, or `dense` [N, K]; with the epilogue its kernel gets. `n`: columns of its result."""

    n: int
    k: int
    packed: PackedLinear | None = None
    dense: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    epilogue: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerParts:
    """One block. linears: by name; k and v are absent where q holds all three, up where gate holds both."""

    norms: dict[str, torch.Tensor]
    linears: dict[str, LinearPart]
    window: int


@dataclass(frozen=True)
class DecoderParts:
    """A whole model: sizes, blocks, and what is around them. rope: float32 [positions, 2, rotary pairs]."""

    spec: DecoderSpec
    layers: list[LayerParts]
    embedding: torch.Tensor | PackedLinear
    norm: torch.Tensor
    head: LinearPart
    rope: torch.Tensor


def refuse(path: str, why: str) -> RunError:
    """LB0560: the model has a part that the program does not do."""
    return RunError("LB0560", f"no program for this model: {why}", where=path, hint="use mode='modules'")


def read_decoder(model: nn.Module, context: int, cache: str = "f16") -> DecoderParts:
    """The parts of `model` for up to `context` positions; raises RunError (LB0560) naming what does not fit."""
    config: Any = getattr(model, "config", None)
    trunk = getattr(model, "model", None)
    if config is None or not isinstance(trunk, nn.Module) or not hasattr(trunk, "layers"):
        raise refuse(type(model).__name__, "it is not a transformers decoder with `model.layers`")
    _children(model, "model", "model", {"model", "lm_head"}, {"model", "lm_head"})
    _children(trunk, "model", "model", {"embed_tokens", "layers", "norm", "rotary_emb"})
    _settings(config)
    blocks = list(cast(nn.ModuleList, trunk.layers))
    layers = [_layer(block, f"model.layers.{i}", _window(config, i)) for i, block in enumerate(blocks)]
    table: Any = trunk.embed_tokens
    packed = table.packed if isinstance(table, QuantEmbedding) else None
    embedding: torch.Tensor = table.weight.detach() if packed is None else packed.operands()[0]
    norm, eps = _norm(cast(nn.Module, trunk.norm), "model.norm")
    rope = _rope(cast(nn.Module, trunk.rotary_emb), embedding, context)
    spec = _spec(config, blocks, table, eps, rope, cache, layers)
    if spec.packed is not None and (sliding := [i for i, layer in enumerate(layers) if layer.window]):
        raise refuse(f"model.layers.{sliding[0]}", f"a cache of {cache} has no sliding windows")
    if embedding.device.type != "cpu" or (packed is None and embedding.dtype not in _DTYPES):
        raise refuse("model", f"it is on {embedding.device.type} in {embedding.dtype}, not on the CPU")
    return DecoderParts(spec, layers, packed or embedding, norm, _linear(model.lm_head, "lm_head"), rope)


def _children(module: nn.Module, path: str, what: str, known: Collection[str], needed: Collection[str] = ()) -> None:
    names = {name for name, child in module.named_children()}
    if unknown := sorted(names - set(known)):
        raise refuse(f"{path}.{unknown[0]}", f"{what} has a part it does not know")
    if missing := sorted(set(needed or known) - names):
        raise refuse(path, f"{what} has no {missing[0]}")


def _settings(config: Any) -> None:
    """Settings that change results without a module of their own, or only on long texts."""
    for name in ("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "use_bidirectional_attention"):
        if getattr(config, name, None) not in (None, False, 1.0):
            raise refuse(f"config.{name}", "it does not know this setting")
    rope = getattr(config, "rope_parameters", None) or {}
    kind = str(rope.get("rope_type", "default"))
    if kind not in _FIXED_ROPE:
        raise refuse("config.rope_parameters", f"rotary positions of kind {kind!r} depend on the length of the text")
    if str(config.hidden_act if hasattr(config, "hidden_act") else config.hidden_activation) not in _ACTIVATIONS:
        raise refuse("config.hidden_act", "it does not know this activation")


def _window(config: Any, layer: int) -> int:
    """Positions a token of `layer` sees; 0 for all."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] not in ("full_attention", "sliding_attention"):
        raise refuse(f"model.layers.{layer}", f"it does not know {types[layer]}")
    sliding = types[layer] == "sliding_attention" if types is not None else getattr(config, "use_sliding_window", True)
    return int(getattr(config, "sliding_window", None) or 0) if sliding else 0


def _layer(block: nn.Module, path: str, window: int) -> LayerParts:
    norm_names = {"input_layernorm": "input_norm", "post_attention_layernorm": "inner_norm"}
    _children(block, path, "the block", {"self_attn", "mlp", *norm_names})
    attention, mlp = cast(nn.Module, block.self_attn), cast(nn.Module, block.mlp)
    projections = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
    _children(attention, f"{path}.self_attn", "attention", {*projections, "q_norm", "k_norm"}, projections)
    norms = {own: _norm(getattr(block, name), f"{path}.{name}")[0] for name, own in norm_names.items()}
    for name, own in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
        if isinstance(found := getattr(attention, name, None), nn.Module):
            norms[own] = _norm(found, f"{path}.self_attn.{name}")[0]
    linears = _projections(attention, f"{path}.self_attn") | _feed_forward(mlp, f"{path}.mlp")
    for name in ("o", "down"):
        linears[name] = replace(linears[name], epilogue=(*linears[name].epilogue, "residual"))
    return LayerParts(norms, linears, window)


def _projections(attention: nn.Module, path: str) -> dict[str, LinearPart]:
    q = attention.q_proj
    if isinstance(q, SiblingLinear):
        return {"q": _stacked(q.shared), "o": _linear(attention.o_proj, path)}
    return {name: _linear(getattr(attention, f"{name}_proj"), f"{path}.{name}_proj") for name in ("q", "k", "v", "o")}


def _feed_forward(mlp: nn.Module, path: str) -> dict[str, LinearPart]:
    if isinstance(mlp, QuantGatedMLP):
        gate = replace(_stacked(mlp.gate_up), epilogue=("silu_mul",))
        return {"gate": replace(gate, n=gate.n // 2), "down": _linear(mlp.reader, path)}
    _children(mlp, path, "the feed-forward part", {"gate_proj", "up_proj", "down_proj", "act_fn"}, ())
    gate_proj = mlp.gate_proj
    if isinstance(gate_proj, SiblingLinear):
        return {"gate": _stacked(gate_proj.shared), "down": _linear(mlp.down_proj, path)}
    return {name: _linear(getattr(mlp, f"{name}_proj"), f"{path}.{name}_proj") for name in ("gate", "up", "down")}


def _stacked(packed: PackedLinear) -> LinearPart:
    """Siblings in one matrix."""
    weight = packed.packed()
    return LinearPart(weight.n, weight.k, packed)


def _linear(module: Any, path: str) -> LinearPart:
    bias = getattr(module, "bias", None)
    epilogue = ("bias",) if bias is not None else ()
    bias = None if bias is None else bias.detach()
    if isinstance(module, QuantLinear):
        packed = module.prepare().inner
        return LinearPart(module.out_features, module.in_features, packed, bias=bias, epilogue=epilogue)
    if type(module) is nn.Linear:
        n, k = module.weight.shape
        return LinearPart(n, k, dense=module.weight.detach(), bias=bias, epilogue=epilogue)
    raise refuse(path, f"a {type(module).__name__} stands where a linear layer should")


def _norm(module: nn.Module, path: str) -> tuple[torch.Tensor, float]:
    """What a root-mean-square norm multiplies with, and its epsilon. Some models store the weight less one."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or eps is None or getattr(module, "bias", None) is not None:
        raise refuse(path, f"{type(module).__name__} is not a root-mean-square norm")
    with torch.no_grad():
        w = weight.detach().float()
        x = torch.linspace(-1.0, 2.0, w.numel())
        unit = x * torch.rsqrt(x.square().mean() + eps)
        got = module(x.to(weight.dtype)).float()
        for scale in (w, w + 1.0):
            if torch.allclose(got, unit * scale, rtol=3e-2, atol=3e-2 * float(scale.abs().max())):
                return scale.contiguous(), float(eps)
    raise refuse(path, f"{type(module).__name__} is not a root-mean-square norm")


def _rope(module: nn.Module, like: torch.Tensor, context: int) -> torch.Tensor:
    """The model's own table of cosines and sines for every position."""
    with torch.no_grad():
        x = torch.zeros(1, dtype=torch.float32, device=like.device)
        cosine, sine = module(x, torch.arange(context)[None])
    half = cosine.shape[-1] // 2
    if cosine.shape[:2] != (1, context) or not torch.equal(cosine[..., :half], cosine[..., half:]):
        raise refuse("model.rotary_emb", "rotary positions are not pairs of the two halves of a head")
    return torch.stack([cosine[0, :, :half], sine[0, :, :half]], dim=1).float().contiguous()


def _spec(
    config: Any,
    blocks: list[nn.Module],
    table: Any,
    eps: float,
    rope: torch.Tensor,
    cache: str,
    layers: list[LayerParts],
) -> DecoderSpec:
    attention: Any = blocks[0].self_attn
    head_dim = int(attention.head_dim)
    heads = int(config.num_attention_heads)
    return DecoderSpec(
        layers=len(blocks),
        hidden=table.embedding_dim,
        inner=layers[0].linears["down"].k,
        heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=head_dim,
        rotary=rope.shape[-1],
        vocab=table.num_embeddings,
        eps=eps,
        scale=float(attention.scaling),
        activation=_ACTIVATIONS[str(getattr(config, "hidden_act", None) or config.hidden_activation)],
        embed_scale=float(getattr(table, "embed_scale", 1.0)),
        embedding=table.key if isinstance(table, QuantEmbedding) else _DTYPES.get(table.weight.dtype, "f32"),
        cache=cache,
    )
