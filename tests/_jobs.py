"""Small models on disk, and runs over them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _models import tiny_llama

from lowbit.compiler.job.run import RunResult, run
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.scheme import Scheme

__all__ = ["Recorder", "contents", "quantize", "save_tiny", "scheme", "token_ids"]


def save_tiny(folder: Path, shard: str = "60KB", **changes: object) -> Path:
    """A random Llama as a model folder of several shards, without a tokenizer."""
    tiny_llama(**changes).save_pretrained(folder, max_shard_size=shard)
    return folder


def token_ids(samples: int = 6, length: int = 24, seed: int = 0, vocabulary: int = 80) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))


def scheme(weight: str = "int4.g32.sym", method: str = "gptq", **options: Any) -> Scheme:
    """A scheme for everything but the output layer."""
    return Scheme("test", parse_format(weight), method, options)


def quantize(model: Path, out: Path, chosen: Scheme | None = None, **options: Any) -> RunResult:
    """A run with small defaults."""
    calibration = options.pop("calibration", token_ids())
    return run(str(model), out, chosen or scheme(), calibration, **{"samples": 6, "length": 24, **options})


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file of a checkpoint but those that hold times."""
    timed = ("report.json", "README.md")
    files = [p for p in sorted(folder.iterdir()) if p.name not in timed]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


class Recorder:
    """A progress sink that remembers."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.messages: list[str] = []
        self.total = self.finished = 0

    def start(self, total_layers: int, names: Sequence[str]) -> None:
        """Note the total."""
        self.total = total_layers

    def layer(self, i: int, n: int, path: str, info: dict[str, Any]) -> None:
        """Note the path."""
        self.layers.append(path)

    def message(self, text: str) -> None:
        """Note the text."""
        self.messages.append(text)

    def finish(self) -> None:
        """Count."""
        self.finished += 1
