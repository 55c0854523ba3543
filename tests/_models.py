"""Small models and quantized tensors for tests."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit.compiler.runtime.experts import prepare_experts, unstack_experts
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.quantizers.formats import Format, parse_format, scalar_format
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.weights import QWeight, random_weight

__all__ = ["dequantized", "random_qtensor", "round_to_nearest", "swap_linears", "tiny_llama"]

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 128,
}


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A random Llama of two layers, float32."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()  # type: ignore[arg-type]


def random_qtensor(fmt: Format | str, n: int, k: int, seed: int = 0) -> QTensor:
    """Random codes, scales and zero points."""
    fmt = scalar_format(fmt) if isinstance(fmt, str) else fmt
    rng = torch.Generator().manual_seed(seed)
    side = fmt.side_shape(n, k)
    finite = fmt.element.levels().isfinite().nonzero().flatten().to(torch.uint8)
    codes = finite[torch.randint(0, len(finite), (n, k), generator=rng)]
    scale = (torch.rand(side, generator=rng) + 0.01).to(fmt.scale_dtype)
    zero = torch.randint(0, 2**fmt.bits, side, generator=rng).to(torch.uint8) if fmt.zero else None
    offset = torch.randn(side, generator=rng).to(fmt.scale_dtype) if fmt.offset else None
    return QTensor(fmt, codes, scale, zero, offset)


def round_to_nearest(weight: torch.Tensor, fmt: Format) -> QTensor:
    """Plain symmetric rounding with one absmax scale per group: enough to make a working model."""
    n, k = weight.shape
    rows, groups = fmt.side_shape(n, k)
    assert rows == n
    g = fmt.granularity.group_size(k)
    padded = torch.nn.functional.pad(weight.detach().float(), (0, groups * g - k)).reshape(n, groups, g)
    scale = (padded.abs().amax(-1) / max(2 ** (fmt.bits - 1) - 1, 1)).clamp(min=1e-6).to(fmt.scale_dtype)
    half = 2 ** (fmt.bits - 1)
    codes = (padded / scale.float()[..., None]).round().clamp(-half, half - 1) + half
    zero = torch.full((n, groups), half, dtype=torch.uint8) if fmt.zero else None
    return QTensor(fmt, codes.reshape(n, -1)[:, :k].to(torch.uint8), scale, zero)


def swap_linears(model: nn.Module, text: str, skip: tuple[str, ...] = ("lm_head",)) -> nn.Module:
    """Replace linear layers, those of experts too, by QuantLinear, in place: rounded to nearest, or with random vectors
    for such a format."""
    fmt, rng = parse_format(text), torch.Generator().manual_seed(0)
    unstack_experts(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not path.endswith(skip):
            if isinstance(fmt, Format):
                q: QWeight = round_to_nearest(module.weight, fmt)
            else:
                q = random_weight(fmt, module.out_features, module.in_features, rng)
            bias = module.bias.detach() if module.bias is not None else None
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, QuantLinear.from_qtensor(q, bias))
    prepare_experts(model)
    return model


def dequantized(model: nn.Module) -> nn.Module:
    """The same model with every QuantLinear turned into a dense nn.Linear of its oracle weights, in place."""
    for path, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            dense = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            dense.weight.data = module.qtensor().dequantize()
            if module.bias is not None:
                dense.bias.data = module.bias.detach().float()
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, dense)
    prepare_experts(model)
    return model
