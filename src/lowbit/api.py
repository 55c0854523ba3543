"""The Python interface: verbs over the same pipeline the command line uses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit.compiler.errors import RunError
from lowbit.compiler.job.evaluate import Divergence
from lowbit.compiler.job.evaluate import compare as _compare
from lowbit.compiler.job.evaluate import perplexity as _perplexity
from lowbit.quantizers.scheme import Scheme, load_scheme

__all__ = [
    "bisect",
    "compare",
    "compile",
    "convert",
    "explain",
    "export",
    "load",
    "locate",
    "perplexity",
    "quantize",
    "save",
    "tune",
]

if TYPE_CHECKING:
    from lowbit.compiler.frontend.bisect import Bisection
    from lowbit.compiler.io.convert import Conversion, TargetLayout
    from lowbit.compiler.job.aot import PackageReport
    from lowbit.compiler.job.divergence import ModuleDivergence
    from lowbit.compiler.job.explain import Explanation
    from lowbit.compiler.job.kernel_tuning import TuneReport

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

    if not isinstance(model, nn.Module):
        hint = "load it first, or call `quantize run` for a model on disk"
        raise RunError("LB0504", f"a {type(model).__name__} is not a torch module", hint=hint)
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


def load(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    trust_kernels: bool | None = None,
    batch_invariant: bool = False,
) -> nn.Module:
    """The model of a quantized checkpoint, or of a GGUF file, on lowbit's kernels. Raises CheckpointError (LB01xx).

    dtype: of activations and of what is not quantized; the checkpoint's own when None. trust_kernels: whether kernels
    that `quantize export` compiled into the checkpoint may run; they are code, so only say True for a folder whose
    maker you trust. None asks LOWBIT_TRUST_KERNELS; False compiles them here instead.
    batch_invariant: a layer's result for a token does not depend, to the bit, on how many other tokens are in the call;
    LOWBIT_BATCH_INVARIANT=1 says so for every model.
    """
    from lowbit.compiler.io.hf import load_quantized
    from lowbit.compiler.runtime.modules import make_invariant

    model = load_quantized(Path(folder), dtype=dtype, trust_kernels=trust_kernels)
    return make_invariant(model) if batch_invariant else model


def save(model: nn.Module, folder: str | Path, *, tokenizer: Any = None) -> Path:
    """Write a quantized model as a checkpoint that `load` and transformers read; `folder` must be absent or empty."""
    from lowbit.compiler.io.hf import save_quantized

    return save_quantized(model, Path(folder), tokenizer=tokenizer)


def convert(folder: str | Path, out: str | Path, *, to: TargetLayout) -> Conversion:
    """Write the quantized checkpoint `folder`, or a GGUF file, in the layout `to`, with exactly its numbers: `gptq`,
    `compressed-tensors`, `vptq`, `lowbit`, or `gguf`. Scales of GGUF's K-quants are rounded to float16.

    out: a folder that must be absent or empty; for `gguf` the file to write. Raises CheckpointError: LB0123 for what
    the layout cannot hold, LB0110, LB0111 and LB0115 for what cannot be written, and others as `load`.
    """
    from lowbit.compiler.io.convert import convert as _convert

    return _convert(folder, out, to)


def compile(
    model: nn.Module,
    *,
    max_tokens: int = 512,
    frozen: bool = False,
    batch_invariant: bool = False,
    mode: str = "modules",
    **options: Any,
) -> nn.Module:
    """Build every kernel `model` can need for up to `max_tokens` tokens at once, and fuse what can be fused.

    mode `modules` (default): layers are drop-ins that the model's own code calls. mode `program`: on a CPU, one native
    program runs whole steps of a decoder-only model, and `forward` and `generate` use it for single sequences; options:
    `context` (positions of a sequence), `head` (a format for a dense output layer, such as `int8.ch.sym`), `embedding`
    (the same for the embedding table and an output layer tied to it), `cache` (`f16` or `f32` keys and values),
    `threads`. With `frozen`, a kernel that is missing later is an error (LB0409) instead of a compile inside a request.
    batch_invariant: as in `load`.
    """
    from lowbit.compiler.runtime.compile import compile_model

    return compile_model(
        model, max_tokens=max_tokens, frozen=frozen, batch_invariant=batch_invariant, mode=mode, **options
    )


def tune(
    model: nn.Module | str | Path,
    *,
    budget: str | float = 60.0,
    tokens: Sequence[int] = (1, 16, 512),
    mode: str = "modules",
    device: str | None = None,
    candidates: int = 8,
    restart: bool = False,
    dry_run: bool = False,
) -> TuneReport:
    """Measure the kernels a quantized model or checkpoint needs on this machine, and remember the best schedules.

    Later loads and compilations on this device use them; choosing never measures. budget: seconds, or `60s`, `5m`;
    what was measured when it is used up is kept, and the same call goes on from there. tokens: token counts to tune
    for. mode: as for `compile`. device: `cpu` or `cuda`; where the model is, or a GPU if there is one, when None.
    candidates: schedules measured for each kernel. restart: measure again. dry_run: only say what would be tuned.
    Raises KernelError (LB0471 to LB0477), RunError LB0503 for a model without quantized layers.
    """
    from lowbit.compiler.job.kernel_tuning import tune_model

    return tune_model(
        model,
        budget=budget,
        tokens=tokens,
        mode=mode,
        device=device,
        candidates=candidates,
        restart=restart,
        dry_run=dry_run,
    )


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


def export(
    model: nn.Module, folder: str | Path, example: torch.Tensor | None = None, *, max_tokens: int = 512
) -> PackageReport:
    """Write a quantized model on the CPU as an AOTInductor package with its kernels: `folder` must be absent or empty.

    The package takes what `example` is (token ids [1, tokens] when None) with 1 to `max_tokens` tokens; a language
    model gives logits [1, tokens, vocabulary]. `load_exported` runs it without the model's code and without a compiler.
    Raises RunError (LB0574, LB0575), KernelError (LB0481), CheckpointError (LB0110).
    """
    from lowbit.compiler.job.aot import export_package

    return export_package(model, Path(folder), example, max_tokens=max_tokens)


def explain(model: nn.Module, tokens: int = 16, **inputs: Any) -> Explanation:
    """What `torch.compile(model, backend="lowbit")` fuses, what not and why, graph breaks and what is left to torch.

    One call with `tokens` token ids, or with keyword arguments `inputs`, is captured; nothing is computed.
    """
    from lowbit.compiler.job.explain import explain_model

    return explain_model(model, tokens, **inputs)


def bisect(model: nn.Module, inputs: dict[str, Any], tolerance: float = 1e-3) -> Bisection:
    """The first compiler pass after which `torch.compile(model, backend="lowbit")` gives other outputs."""
    from lowbit.compiler.frontend.bisect import bisect_passes

    return bisect_passes(model, inputs, tolerance)
