"""The Python interface: five verbs over the same pipeline the command line uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit.compiler.job.evaluate import Divergence
from lowbit.compiler.job.evaluate import compare as _compare
from lowbit.compiler.job.evaluate import perplexity as _perplexity
from lowbit.quantizers.scheme import Scheme, load_scheme

__all__ = ["bisect", "compare", "compile", "load", "locate", "perplexity", "quantize", "save"]

if TYPE_CHECKING:
    from lowbit.compiler.frontend.bisect import Bisection
    from lowbit.compiler.job.divergence import ModuleDivergence

Calibration = str | Path | Sequence[str] | torch.Tensor | None


def quantize(
    model: nn.Module,
    scheme: str | Scheme = "w4a16",
    *,
    calibration: Calibration = None,
    tokenizer: Any = None,
    format: str | None = None,
    method: str | None = None,
) -> nn.Module:
    """Replace the linear layers of `model` by quantized ones, in place, and return it.

    scheme: a preset (`w4a16`), a TOML file or a Scheme; `format` and `method` replace parts of it. calibration: token
    ids [samples, length], or a text file, texts or data set, which need `tokenizer`. Methods that look at no data
    (`rtn`) need none. Raises FormatError (LB02xx) or RunError (LB05xx) before anything is changed.
    """
    from lowbit.compiler.job.run import quantize_model

    chosen = scheme if isinstance(scheme, Scheme) else load_scheme(scheme)
    if format is not None or method is not None:
        chosen = _replaced(chosen, format, method)
    return quantize_model(model, chosen, calibration, tokenizer=tokenizer)


def _replaced(scheme: Scheme, format: str | None, method: str | None) -> Scheme:
    from dataclasses import replace

    from lowbit.quantizers.formats import parse_format

    return replace(
        scheme,
        weight=parse_format(format) if format else scheme.weight,
        method=method or scheme.method,
        name=f"{scheme.name}+{format or method}",
    )


def load(folder: str | Path, *, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a quantized checkpoint, on lowbit's kernels. Raises CheckpointError (LB01xx).

    dtype: of activations and of what is not quantized; the checkpoint's own when None.
    """
    from lowbit.compiler.io.hf import load_quantized

    return load_quantized(Path(folder), dtype=dtype)


def save(model: nn.Module, folder: str | Path, *, tokenizer: Any = None) -> Path:
    """Write a quantized model as a checkpoint that `load` and transformers read; `folder` must be absent or empty."""
    from lowbit.compiler.io.hf import save_quantized

    return save_quantized(model, Path(folder), tokenizer=tokenizer)


def compile(
    model: nn.Module, *, max_tokens: int = 512, frozen: bool = False, mode: str = "modules", **options: Any
) -> nn.Module:
    """Build every kernel `model` can need for up to `max_tokens` tokens at once, and fuse what can be fused.

    mode `modules` (default): layers are drop-ins that the model's own code calls. mode `program`: on a CPU, one native
    program runs whole steps of a decoder-only model, and `forward` and `generate` use it for single sequences; options:
    `context` (positions of a sequence), `head` (a format for a dense output layer, such as `int8.ch.sym`), `cache`
    (`f16` or `f32` keys and values), `threads`. With `frozen`, a kernel that is missing later is an error (LB0409)
    instead of a compile inside a request.
    """
    from lowbit.compiler.runtime.compile import compile_model

    return compile_model(model, max_tokens=max_tokens, frozen=frozen, mode=mode, **options)


def perplexity(model: nn.Module, ids: torch.Tensor, windows: int = 16, length: int = 1024) -> float:
    """Perplexity on token ids [tokens]: consecutive windows, no special tokens, float32 logits."""
    return _perplexity(model, ids, windows, length)


def compare(
    model: nn.Module, reference: nn.Module, ids: torch.Tensor, windows: int = 16, length: int = 1024
) -> Divergence:
    """KL(reference || model) per token on token ids [tokens]: mean, 99th percentile, largest, same first choice."""
    return _compare(model, reference, ids, windows, length)


def locate(model: nn.Module, reference: nn.Module, ids: torch.Tensor, tolerance: float = 1e-2) -> ModuleDivergence:
    """Where `model` parts from `reference`: errors module by module, KL of the logits, first divergence."""
    from lowbit.compiler.job.divergence import locate as _locate

    return _locate(model, reference, ids, tolerance)


def bisect(model: nn.Module, inputs: dict[str, Any], tolerance: float = 1e-3) -> Bisection:
    """The first compiler pass after which `torch.compile(model, backend="lowbit")` gives other outputs."""
    from lowbit.compiler.frontend.bisect import bisect_passes

    return bisect_passes(model, inputs, tolerance)
