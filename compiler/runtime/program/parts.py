"""What a decoder is made of: a walk over a transformers model that refuses what the program does not do.

The walk recognises Llama's structure by names and checks every child, so that an unknown part is an error here; what
it reads is then compared with the model numerically (see `verify`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from lowbit.codegen.cpp.decoder.spec import Activation, DecoderSpec
from lowbit.compiler.runtime.embedding import QuantEmbedding
from lowbit.compiler.runtime.fused import SiblingLinear
from lowbit.compiler.runtime.modules import PackedLinear
from lowbit.compiler.runtime.program.linears import (
    Gated,
    LinearPart,
    check_children,
    read_gated,
    read_linear,
    refuse,
    stacked,
)
from lowbit.compiler.runtime.program.mixture import MixtureParts, is_mixture, read_mixture

__all__ = ["DecoderParts", "LayerParts", "activation_of", "read_decoder"]

_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
}  # fmt: skip
_FIXED_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}
"""Kinds of rotary positions whose table does not depend on the length of the text."""


@dataclass(frozen=True)
class LayerParts:
    """One block. linears: of attention, by name; k and v are absent where their rows are behind those of q, or v's
    behind those of k. mlp: what follows."""

    norms: dict[str, torch.Tensor]
    linears: dict[str, LinearPart]
    window: int
    mlp: Gated | MixtureParts

    def all_linears(self) -> Iterator[LinearPart]:
        """Every matrix."""
        yield from self.linears.values()
        yield from self.mlp.values() if isinstance(self.mlp, dict) else self.mlp.all_linears()

    def gated(self) -> list[Gated]:
        """Every dense feed-forward part, experts included."""
        if isinstance(self.mlp, dict):
            return [self.mlp]
        return [*self.mlp.experts, *([self.mlp.shared] if self.mlp.shared else [])]


@dataclass(frozen=True)
class DecoderParts:
    """A whole model: sizes, blocks, and what is around them. rope: float32 [positions, 2, rotary pairs]."""

    spec: DecoderSpec
    layers: list[LayerParts]
    embedding: torch.Tensor | PackedLinear
    norm: torch.Tensor
    head: LinearPart
    rope: torch.Tensor


def read_decoder(model: nn.Module, context: int, cache: str = "f16") -> DecoderParts:
    """The parts of `model` for up to `context` positions; raises RunError (LB0560) naming what does not fit."""
    config: Any = getattr(model, "config", None)
    trunk = getattr(model, "model", None)
    if config is None or not isinstance(trunk, nn.Module) or not hasattr(trunk, "layers"):
        raise refuse(type(model).__name__, "it is not a transformers decoder with `model.layers`")
    check_children(model, "model", "model", *[{"model", "lm_head"}] * 2)
    check_children(trunk, "model", "model", *[{"embed_tokens", "layers", "norm", "rotary_emb"}] * 2)
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
    return DecoderParts(spec, layers, packed or embedding, norm, read_linear(model.lm_head, "lm_head"), rope)


def _settings(config: Any) -> None:
    """Settings that change results without a module of their own, or only on long texts."""
    softcaps = ("attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping")
    for name in (*softcaps, "logit_scale", "use_bidirectional_attention", "clip_qkv"):
        if getattr(config, name, None) not in (None, False, 1.0):
            raise refuse(f"config.{name}", "it does not know this setting")
    rope = getattr(config, "rope_parameters", None) or {}
    kind = str(rope.get("rope_type", "default"))
    if kind not in _FIXED_ROPE:
        raise refuse("config.rope_parameters", f"rotary positions of kind {kind!r} depend on the length of the text")
    activation_of(config)


def activation_of(config: Any) -> Activation:
    """What gates are put through."""
    name = str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None))
    if name not in _ACTIVATIONS:
        raise refuse("config.hidden_act", "it does not know this activation")
    return _ACTIVATIONS[name]


def _window(config: Any, layer: int) -> int:
    """Positions a token of `layer` sees; 0 for all."""
    types = getattr(config, "layer_types", None)
    if types is not None and types[layer] not in ("full_attention", "sliding_attention"):
        raise refuse(f"model.layers.{layer}", f"it does not know {types[layer]}")
    sliding = types[layer] == "sliding_attention" if types is not None else getattr(config, "use_sliding_window", True)
    return int(getattr(config, "sliding_window", None) or 0) if sliding else 0


def _layer(block: nn.Module, path: str, window: int) -> LayerParts:
    norm_names = {"input_layernorm": "input_norm", "post_attention_layernorm": "inner_norm"}
    check_children(block, path, "the block", *[{"self_attn", "mlp", *norm_names}] * 2)
    attention, mlp = cast(nn.Module, block.self_attn), cast(nn.Module, block.mlp)
    projections = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o"}
    check_children(attention, f"{path}.self_attn", "attention", {*projections, "q_norm", "k_norm"}, projections)
    norms = {own: _norm(getattr(block, name), f"{path}.{name}")[0] for name, own in norm_names.items()}
    for name, own in (("q_norm", "query_norm"), ("k_norm", "key_norm")):
        if isinstance(found := getattr(attention, name, None), nn.Module):
            norms[own] = _norm(found, f"{path}.self_attn.{name}")[0]
    linears = _projections(attention, f"{path}.self_attn")
    linears["o"] = linears["o"].behind("residual")
    if is_mixture(mlp):
        return LayerParts(norms, linears, window, read_mixture(mlp, f"{path}.mlp"))
    gated = read_gated(mlp, f"{path}.mlp")
    return LayerParts(norms, linears, window, gated | {"down": gated["down"].behind("residual")})


def _projections(attention: nn.Module, path: str) -> dict[str, LinearPart]:
    found: dict[str, LinearPart] = {}
    seen: list[PackedLinear] = []
    for name in ("q", "k", "v", "o"):
        module = getattr(attention, f"{name}_proj")
        if not isinstance(module, SiblingLinear):
            found[name] = read_linear(module, f"{path}.{name}_proj")
        elif not any(module.shared is shared for shared in seen):
            found[name] = stacked(module.shared, f"{path}.{name}_proj")
            seen.append(module.shared)
    return found


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
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    mixtures = [layer.mlp for layer in layers if isinstance(layer.mlp, MixtureParts)]
    return DecoderSpec(
        layers=len(blocks),
        hidden=table.embedding_dim,
        inner=max(gated["down"].k for layer in layers for gated in layer.gated()),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary=rope.shape[-1],
        vocab=table.num_embeddings,
        eps=eps,
        scale=float(attention.scaling),
        activation=activation_of(config),
        embed_scale=float(getattr(table, "embed_scale", 1.0)),
        embedding=table.key if isinstance(table, QuantEmbedding) else _DTYPES.get(table.weight.dtype, "f32"),
        cache=cache,
        experts=max((len(m.experts) for m in mixtures), default=0),
        active=max((m.active for m in mixtures), default=0),
        wide_norms=_wide_norms(layers, head_dim, (heads * head_dim, kv_heads * head_dim)),
    )


def _wide_norms(layers: list[LayerParts], head: int, rows: tuple[int, int]) -> bool:
    """Whether norms of queries and keys go over all heads at once, rather than over each."""
    sizes = [tuple(len(layer.norms[n]) for n in ("query_norm", "key_norm") if n in layer.norms) for layer in layers]
    if all(size in ((), (head, head)) for size in sizes):
        return False
    odd = next((i for i, size in enumerate(sizes) if size != rows), None)
    if odd is not None:
        raise refuse(f"model.layers.{odd}.self_attn", f"norms of queries and keys have {sizes[odd]} entries")
    return True
