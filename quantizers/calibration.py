"""Calibration: which text a model is shown, and the second moments of what its linear layers then see.

The loss every method minimises is tr(D H D^T) with D = quantized - original and H = mean of x x^T over calibration
tokens (uncentred, no factor two), following "Optimal Brain Compression" (Frantar & Alistarh) and "GPTQ" (Frantar et
al.). Layers fed by one and the same tensor (q, k and v; gate and up) share one H.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.compiler.errors import CheckpointError, RunError

__all__ = [
    "Coverage",
    "HessianAccumulator",
    "InputGroups",
    "LayerStats",
    "calibration_text",
    "calibration_tokens",
    "hook_inputs",
]


@dataclass(frozen=True, eq=False)
class LayerStats:
    """What a layer's inputs look like: hessian [K, K] (float32 or float64, mean of x x^T) over `tokens` tokens.

    shift: [K, K], mean of (r - x) x^T where r is what the float model's layer reads in the place of x; None where that
    is not known. derived: what methods computed from all this, for sibling layers; it goes when the statistics go.
    """

    hessian: Tensor
    tokens: int
    shift: Tensor | None = None
    derived: dict[Any, Any] = field(default_factory=dict, repr=False)

    def in_order(self, order: Tensor) -> LayerStats:
        """The same with channels in another order: place i is channel order[i]."""
        shift = self.shift[order][:, order] if self.shift is not None else None
        return LayerStats(self.hessian[order][:, order], self.tokens, shift)


@dataclass(frozen=True)
class Coverage:
    """How well calibration covered a layer: tokens seen, input channels that were always zero, and K."""

    tokens: int
    dead: int
    channels: int

    @staticmethod
    def of(stats: LayerStats) -> Coverage:
        """The coverage that `stats` stand for."""
        diagonal = stats.hessian.diagonal()
        return Coverage(stats.tokens, int((diagonal == 0).sum()), diagonal.numel())

    def warning(self) -> str | None:
        """One line when the statistics are thin (fewer tokens than channels, or dead channels), else None."""
        if self.tokens < self.channels:
            return f"{self.tokens} calibration tokens for {self.channels} input channels"
        return f"{self.dead} of {self.channels} input channels are always zero" if self.dead else None


class HessianAccumulator:
    """Running sum of x x^T, and of (r - x) x^T where r is given: products of a batch in float32, the sum over batches
    in float64.

    `skip_first` leaves out the first positions of every sequence (the mask of "MiniCPM4", called P-GPTQ there). It is
    off by default: in models whose first tokens carry the attention sink it removes what must be kept.
    """

    def __init__(self, channels: int, skip_first: int = 0) -> None:
        self._sum = torch.zeros(channels, channels, dtype=torch.float64)
        self._shift: Tensor | None = None
        self._skip = skip_first
        self.tokens = 0
        self._compared = 0

    def add(self, x: Tensor, reference: Tensor | None = None) -> None:
        """Add inputs [..., tokens, K], and what the float model has in their place, where its shape is the same.

        Non-finite values raise RunError (LB0510).
        """
        rows = self._rows(x)
        self._sum += self._product(rows, rows)
        self.tokens += rows.shape[0]
        if reference is not None and reference.shape == x.shape:
            if self._shift is None:
                self._shift = torch.zeros_like(self._sum)
            self._shift += self._product(self._rows(reference) - rows, rows)
            self._compared += rows.shape[0]

    def _rows(self, x: Tensor) -> Tensor:
        if self._skip and x.dim() >= 3:
            x = x[..., self._skip :, :]
        return x.detach().reshape(-1, x.shape[-1]).float()

    @staticmethod
    def _product(left: Tensor, right: Tensor) -> Tensor:
        product = left.T @ right
        # A non-finite activation makes its channel's diagonal entry non-finite, so the diagonal is enough to look at.
        if not bool(product.diagonal().isfinite().all()):
            raise RunError(
                "LB0510",
                "activations are not finite during calibration",
                hint="check the model in float32 on the same text",
            )
        return product

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        sums = [self._sum, *([self._shift] if self._shift is not None else [])]
        return sum(s.numel() * s.element_size() for s in sums)

    def stats(self) -> LayerStats:
        """The means so far in float64, the Hessian exactly symmetric; the shift if every token was compared."""
        mean = self._sum / max(self.tokens, 1)
        shift = self._shift / self.tokens if self._shift is not None and self._compared == self.tokens else None
        return LayerStats((mean + mean.T) / 2, self.tokens, shift)


def hook_inputs(modules: Mapping[str, nn.Module], saw: Callable[[str, Tensor], Tensor | None]) -> ExitStack:
    """Call `saw(name, x)` with the first argument of every call of a module, which becomes what `saw` returns unless
    that is None. The hooks go when the result is closed."""
    hooks = ExitStack()

    def before(name: str, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = saw(name, args[0])
        return None if changed is None else (changed, *args[1:])

    for name, module in modules.items():
        hook = lambda _module, args, name=name: before(name, args)  # noqa: E731
        hooks.callback(module.register_forward_pre_hook(hook).remove)
    return hooks


@dataclass
class InputGroups:
    """Finds which linear layers read the same tensor, and accumulates one Hessian per such tensor.

    Used as a context manager around forward passes: `with groups: block(x)`. `order` lists the groups in the order in
    which their input first appears, which is the order of dependency inside a block. With `collect=None` nothing is
    accumulated and only the grouping is found; otherwise the listed groups are collected, and the forward pass is
    abandoned (with `InputGroups.Done`) as soon as the last of them was seen when `stop_early` is set. reference: what
    the float model has in the place of the one collected input; set it anew for each pass.
    """

    linears: Mapping[str, nn.Module]
    skip_first: int = 0
    order: list[list[str]] = field(default_factory=list)
    collect: Sequence[int] | None = None
    stop_early: bool = False
    accumulators: dict[int, HessianAccumulator] = field(default_factory=dict)
    reference: Tensor | None = None

    class Done(Exception):
        """Raised out of a forward pass when everything asked for was collected."""

    def __post_init__(self) -> None:
        self._index = {name: i for i, group in enumerate(self.order) for name in group}
        self._live: list[tuple[Tensor, int]] = []
        self._hooks = ExitStack()

    def __enter__(self) -> InputGroups:
        self._hooks = hook_inputs(self.linears, self._saw)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._hooks.close()
        self._live.clear()

    def start(self) -> None:
        """Forget the tensors of the forward pass before; call ahead of each pass."""
        self._live.clear()

    def _saw(self, name: str, x: Tensor) -> None:
        group = self._index.get(name)
        if group is None:
            group = self._assign(name, x)
        if self.collect is None or group not in self.collect or name != self.order[group][0]:
            return
        accumulator = self.accumulators.get(group)
        if accumulator is None:
            accumulator = self.accumulators[group] = HessianAccumulator(x.shape[-1], self.skip_first)
        accumulator.add(x, self.reference)
        if self.stop_early and group == max(self.collect):
            raise InputGroups.Done

    def _assign(self, name: str, x: Tensor) -> int:
        """The group of a layer seen for the first time: that of an earlier reader of the same tensor, or a new one."""
        for seen, group in self._live:
            if seen is x:
                self.order[group].append(name)
                break
        else:
            group = len(self.order)
            self.order.append([name])
            # Holding the tensor keeps its identity from being reused by a later one.
            self._live.append((x, group))
        self._index[name] = group
        return group


def calibration_text(source: str | Path | Sequence[str]) -> str:
    """The text behind a calibration source.

    source: `pydoc` (the language reference inside every CPython), a .txt file, a .jsonl file with `text` fields, a
    list of texts, or the name of a hub dataset (needs the `datasets` package). Raises CheckpointError (LB0101) for a
    file that is not there or not text, RunError (LB0521) when `datasets` is missing or has no such text.
    """
    if not isinstance(source, (str, Path)):
        return "\n\n".join(source)
    if str(source) == "pydoc":
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        return "\n\n".join(topics[key] for key in sorted(topics))
    path = Path(source).expanduser()
    if path.is_file():
        return _read(path)
    name = str(source)
    if name.count("/") == 1 and path.suffix not in (".txt", ".jsonl") and not name.startswith((".", "/", "~")):
        return _dataset_text(name)
    raise CheckpointError(
        "LB0101", "no such calibration text", where=name, hint="give a text file, or `pydoc` for the built-in text"
    )


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return text
        return "\n\n".join(str(json.loads(line)["text"]) for line in text.splitlines() if line.strip())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as e:
        raise CheckpointError(
            "LB0101",
            f"cannot read calibration text: {type(e).__name__}: {e}",
            where=str(path),
            hint="give UTF-8 text, or .jsonl lines with a `text` field",
        ) from e


def _dataset_text(name: str) -> str:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as e:
        raise RunError(
            "LB0521",
            f"{name!r} looks like a hub dataset, and the `datasets` package is not installed",
            hint="install `datasets`, or give a text file, or `pydoc` for the built-in text",
        ) from e
    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(name, split="train", streaming=True)
        picked = [str(row["text"]) for row, _ in zip(rows, range(4096), strict=False)]
    except Exception as e:  # the client raises a dozen kinds; to the user they are one
        raise RunError("LB0521", f"cannot read dataset: {type(e).__name__}: {e}", where=name) from e
    return "\n\n".join(picked)


def calibration_tokens(
    tokenizer: Any, source: str | Path | Sequence[str] | Tensor, samples: int = 128, length: int = 512, seed: int = 0
) -> Tensor:
    """Token ids int64 [samples, length]: windows drawn without overlap from the tokenized text, in random order.

    A tensor of ids [S, L] is used as it is (its first `samples` rows). Raises RunError: LB0520 for a bad count,
    LB0522 when the text is too short or no tokenizer is given, LB0523 when the ids are not a matrix of integers.
    """
    if samples < 1 or length < 2:
        raise RunError("LB0520", f"cannot calibrate with {samples} samples of {length} tokens", hint="use 128 and 512")
    if isinstance(source, Tensor):
        return _given_tokens(source, samples)
    if tokenizer is None:
        raise RunError("LB0522", "calibration text needs a tokenizer", hint="pass `tokenizer`, or token ids")
    encoded = tokenizer(calibration_text(source), add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.as_tensor(encoded, dtype=torch.int64).flatten()
    windows = ids.numel() // length
    if windows < samples:
        raise RunError(
            "LB0522",
            f"the calibration text has {ids.numel()} tokens, {samples} x {length} need {samples * length}",
            where=source if isinstance(source, str) else None,
            hint=f"use {f'at most {windows} samples, or ' if windows else ''}a longer text",
        )
    order = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples]
    return ids[: windows * length].reshape(windows, length)[order].contiguous()


def _given_tokens(ids: Tensor, samples: int) -> Tensor:
    if ids.dim() != 2 or ids.is_floating_point() or ids.numel() == 0 or bool((ids < 0).any()):
        raise RunError("LB0523", f"token ids must be non-negative integers [samples, length], not {tuple(ids.shape)}")
    return ids[:samples].to(torch.int64).contiguous()
