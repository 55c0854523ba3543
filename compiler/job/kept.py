"""What of a model is no linear layer and therefore stays as it is: experts in one parameter, routers, convolutions."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

__all__ = ["kept_matrices"]


def kept_matrices(model: nn.Module) -> tuple[str, ...]:
    """One line per kind of matrix parameter that is multiplied with but is no `nn.Linear`, largest first.

    Mixture-of-experts models hold all experts of a block in one parameter of three dimensions and multiply it with a
    grouped product; GPT-2's layers are transposed. Neither is quantized, and whoever plans a run is told so.
    """
    kinds: dict[tuple[str, str, tuple[int, ...]], list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        if type(module) is nn.Linear or isinstance(module, nn.Embedding):
            continue
        for name, p in module.named_parameters(recurse=False):
            if p.dim() > 1 and p.is_floating_point():
                kinds[type(module).__name__, name, tuple(p.shape)].append(path)
    found = sorted(((_count(shape) * len(paths), key, paths) for key, paths in kinds.items() for shape in [key[2]]))
    return tuple(_line(weights, *key, paths) for weights, key, paths in reversed(found))


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _line(weights: int, kind: str, name: str, shape: tuple[int, ...], paths: list[str]) -> str:
    size = " x ".join(map(str, shape))
    what = "experts in one parameter" if len(shape) == 3 else f"a {kind}, not a linear layer"
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return f"{weights:,} weights kept as stored: {paths[0]}.{name} ({size}: {what}){more}"
