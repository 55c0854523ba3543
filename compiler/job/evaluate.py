"""What quantization costs: perplexity, and KL divergence from a reference model, streamed window by window.

The protocol, so that figures can be compared: the raw text is tokenized once, no special token is added, the ids are
cut into consecutive windows that do not overlap, and each window is run on its own. A window of L tokens gives L - 1
predictions. Perplexity is the exponential of the mean negative log-likelihood over all of them, from float32 logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.compiler.errors import CheckpointError, RunError

__all__ = [
    "Divergence",
    "Evaluation",
    "compare",
    "cut_windows",
    "evaluate",
    "generate",
    "perplexity",
    "read_text",
    "tokenize",
]

_CHUNK = 256  # positions whose float32 log-probabilities are held at once

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Divergence:
    """KL(reference || model) in nats per predicted token, and how often both choose the same token."""

    mean: float
    p99: float
    max: float
    same_top1: float


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model on one text.

    nll: mean negative log-likelihood, nats per token. stderr: standard error of `nll` over windows, as a perplexity
    range says more than its digits. tokens: tokens run, of which `predictions` were scored. seconds: in the model only.
    """

    perplexity: float
    nll: float
    stderr: float
    tokens: int
    predictions: int
    windows: int
    length: int
    seconds: float
    kl: Divergence | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens run per second of model time (prefill, one window at a time)."""
        return self.tokens / self.seconds if self.seconds else float("inf")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; infinite figures become None."""
        values = {**asdict(self), "tokens_per_second": self.tokens_per_second}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a file; raises CheckpointError LB0151 when it is missing or not text."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise CheckpointError("LB0151", "no such text file", where=str(path)) from e
    except (OSError, UnicodeDecodeError) as e:
        raise CheckpointError("LB0151", f"cannot be read as UTF-8 text: {e}", where=str(path)) from e


def tokenize(tokenizer: Any, text: str) -> torch.Tensor:
    """int64 [tokens]: the whole text at once, without special tokens."""
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def cut_windows(ids: torch.Tensor, windows: int, length: int, where: str = "text") -> torch.Tensor:
    """int64 [windows, length]: the first consecutive windows; RunError LB0540 when the text is too short for one."""
    if length < 2 or windows < 1:
        raise RunError("LB0541", f"cannot cut {windows} windows of {length} tokens", hint="use length >= 2")
    have = min(windows, ids.numel() // length)
    if not have:
        raise RunError(
            "LB0540",
            f"{ids.numel()} tokens are fewer than one window of {length}",
            where=where,
            hint="give a longer text or a smaller --length",
        )
    return ids[: have * length].view(have, length)


def perplexity(model: nn.Module, ids: torch.Tensor, windows: int = 16, length: int = 1024) -> float:
    """Perplexity of `model` on token ids [tokens], by this module's protocol."""
    return evaluate(model, ids, windows, length).perplexity


def compare(
    model: nn.Module, reference: nn.Module, ids: torch.Tensor, windows: int = 16, length: int = 1024
) -> Divergence:
    """KL(reference || model) on token ids [tokens], by this module's protocol."""
    kl = evaluate(model, ids, windows, length, reference=reference).kl
    assert kl is not None
    return kl


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    ids: torch.Tensor,
    windows: int = 16,
    length: int = 1024,
    *,
    reference: nn.Module | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Run `model` (and `reference`) over the windows of `ids` [tokens]; see the module's docstring.

    One window's logits are held at a time. `progress(done, total, perplexity so far)` is called after each window.
    """
    model.eval()
    batch = cut_windows(ids, windows, length)
    losses: list[float] = []
    divergences: list[torch.Tensor] = []
    agree, seconds = 0, 0.0
    for i, window in enumerate(batch):
        begin = time.perf_counter()
        logits = _logits(model, window)
        seconds += time.perf_counter() - begin
        losses.append(_nll(logits, window))
        if reference is not None:
            kl, same = _kl(_logits(reference.eval(), window)[:-1], logits[:-1])
            divergences.append(kl)
            agree += same
        if progress is not None:
            progress(i + 1, len(batch), _exp(sum(losses) / len(losses)))
    nll = sum(losses) / len(losses)
    predictions = len(batch) * (length - 1)
    return Evaluation(
        _exp(nll),
        nll,
        _stderr(losses),
        batch.numel(),
        predictions,
        len(batch),
        length,
        seconds,
        _summary(torch.cat(divergences), agree / predictions) if divergences else None,
    )


@torch.inference_mode()
def generate(model: nn.Module, prompt: torch.Tensor, tokens: int) -> tuple[float, torch.Tensor]:
    """(tokens per second, ids): greedy generation of exactly `tokens` new tokens after `prompt` int64 [1, length].

    The speed is that of decoding, one token at a time with a key-value cache: the prompt's own pass and the first
    call, which may build kernels, are left out. ids int64 [length + tokens].
    """
    options = {"do_sample": False, "use_cache": True, "attention_mask": torch.ones_like(prompt)}
    seconds = []
    for count in (2, 1, tokens):  # the first is a warm-up
        begin = time.perf_counter()
        out = model.generate(prompt, min_new_tokens=count, max_new_tokens=count, **options)  # type: ignore[operator]
        seconds.append(time.perf_counter() - begin)
    return (tokens - 1) / max(seconds[2] - seconds[1], 1e-9), out[0]


def _logits(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    """[length, vocabulary] in the model's own dtype."""
    device = next(model.parameters()).device
    return model(input_ids=window[None].to(device), use_cache=False).logits[0]  # type: ignore[no-any-return]


def _nll(logits: torch.Tensor, window: torch.Tensor) -> float:
    """Mean negative log-likelihood of window[1:], in float32, summed in float64."""
    target = window[1:].to(logits.device)
    total = 0.0
    for start in range(0, target.numel(), _CHUNK):
        part = target[start : start + _CHUNK]
        rows = logits[start : start + part.numel()].float()
        total += float(nn.functional.cross_entropy(rows, part, reduction="none").double().sum())
    return total / target.numel()


def _kl(reference: torch.Tensor, model: torch.Tensor) -> tuple[torch.Tensor, int]:
    """KL(reference || model) per row of logits, float32 on the CPU, and how many rows have the same largest logit."""
    parts, same = [], 0
    for start in range(0, reference.shape[0], _CHUNK):
        p = reference[start : start + _CHUNK].float().log_softmax(-1)
        q = model[start : start + _CHUNK].to(p.device).float().log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1).cpu())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
    return torch.cat(parts), same


def _summary(kl: torch.Tensor, same: float) -> Divergence:
    rank = max(1, math.ceil(0.99 * kl.numel()))
    return Divergence(float(kl.double().mean()), float(kl.kthvalue(rank).values), float(kl.max()), same)


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else float("inf")


def _stderr(losses: list[float]) -> float:
    if len(losses) < 2:
        return 0.0
    mean = sum(losses) / len(losses)
    return math.sqrt(sum((x - mean) ** 2 for x in losses) / (len(losses) - 1) / len(losses))
