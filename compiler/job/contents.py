"""What a checkpoint holds, from its headers: tensors, how each is stored, bytes and bits per weight."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.checkpoint import Checkpoint, read_checkpoint
from lowbit.compiler.io.safetensors_file import TensorInfo
from lowbit.compiler.io.source import open_model
from lowbit.compiler.io.source_folder import load_json, open_shards
from lowbit.compiler.job.models import is_quantized

__all__ = ["Contents", "Stored", "read_contents"]

_EMBEDDINGS = ("embed_tokens", "wte", "lm_head", "token_embd", "output", "embed_in", "embed_out")


@dataclass(frozen=True)
class Stored:
    """One weight, or the sum of several. kind: a format (`int4.g64.sym`), a GGUF type (`Q4_1`) or a dtype.

    shape: of the matrix it stands for. weights: numbers it stands for. nbytes: stored, scales and zero points included.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    nbytes: int
    count: int = 1

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per number."""
        return 8 * self.nbytes / max(self.weights, 1)

    @property
    def embedding(self) -> bool:
        """True for token embeddings and output heads, which most schemes keep."""
        parts = self.name.split(".")
        return any(part in _EMBEDDINGS for part in parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "shape": list(self.shape), "bits_per_weight": self.bits_per_weight}


@dataclass(frozen=True)
class Contents:
    """A checkpoint's weights; `method` says how it is quantized."""

    architecture: str
    method: str
    tensors: tuple[Stored, ...]

    @property
    def weights(self) -> int:
        """Numbers in the model."""
        return sum(t.weights for t in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors)

    def by_kind(self) -> list[Stored]:
        """Sums over tensors that are stored the same way, largest first."""
        kinds = {t.kind for t in self.tensors}
        sums = [_total(kind, [t for t in self.tensors if t.kind == kind]) for kind in kinds]
        return sorted(sums, key=lambda t: -t.nbytes)

    def bits(self) -> tuple[float, float]:
        """Bits per weight over everything, and without embeddings and head."""
        inner = _total("", [t for t in self.tensors if not t.embedding])
        return _total("", self.tensors).bits_per_weight, inner.bits_per_weight

    def describe_bits(self) -> str:
        """Both figures as a sentence."""
        everything, inner = self.bits()
        return f"{everything:.3f} over everything, {inner:.3f} without embeddings and head"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        everything, inner = self.bits()
        return {
            "architecture": self.architecture,
            "quantization": self.method,
            "weights": self.weights,
            "bytes": self.nbytes,
            "bits_per_weight": everything,
            "bits_per_weight_without_embeddings": inner,
            "kinds": [{k: v for k, v in t.to_dict().items() if k not in ("name", "shape")} for t in self.by_kind()],
            "tensors": [t.to_dict() for t in self.tensors],
        }


def _total(kind: str, tensors: Iterable[Stored]) -> Stored:
    members = list(tensors)
    return Stored(kind, kind, (), sum(t.weights for t in members), sum(t.nbytes for t in members), len(members))


def read_contents(model: str) -> Contents:
    """Read the headers of a quantized checkpoint, a model folder or a GGUF file.

    Raises CheckpointError: LB0101 nothing there, LB0102 and LB0103 broken files, LB0109 GGUF not readable.
    """
    path = Path(model).expanduser()
    if is_quantized(path):
        return _quantized(read_checkpoint(path), _infos(path))
    if path.is_dir():
        infos = _infos(path)
        config = load_json(path / "config.json", "LB0108") if (path / "config.json").exists() else {}
        architecture = ", ".join(map(str, config.get("architectures") or ["unknown"]))
        return Contents(architecture, "none", tuple(_plain(name, info) for name, info in infos.items()))
    return _gguf(path) if path.is_file() else _hub(model)


def _infos(folder: Path) -> dict[str, TensorInfo]:
    """Header entry by tensor name, from validated files."""
    return {name: file.header.tensors[name] for name, file in open_shards(folder).items()}


def _plain(name: str, info: TensorInfo) -> Stored:
    kind = str(info.dtype).removeprefix("torch.")
    return Stored(name, kind, info.shape, math.prod(info.shape), info.end - info.start)


def _quantized(checkpoint: Checkpoint, infos: dict[str, TensorInfo]) -> Contents:
    plain = set(checkpoint.plain_names())
    tensors = [_plain(name, infos[name]) for name in infos if name in plain]
    for path, fmt in checkpoint.modules.items():
        parts = [infos[name] for name in checkpoint.module_names(path)]
        shape = checkpoint.shape(path)
        tensors.append(Stored(path, str(fmt), shape, math.prod(shape), sum(p.end - p.start for p in parts)))
    architectures = checkpoint.config.get("architectures") or ["unknown"]
    return Contents(", ".join(map(str, architectures)), checkpoint.method, tuple(tensors))


def _gguf(path: Path) -> Contents:
    try:
        from gguf import GGUFReader
    except ImportError as e:
        raise CheckpointError("LB0109", "needs the gguf package", where=str(path), hint="pip install gguf") from e
    try:
        reader = GGUFReader(path)
        field = reader.fields.get("general.architecture")
        tensors = tuple(_gguf_tensor(t) for t in reader.tensors)
    except Exception as e:  # the reader checks little; whatever breaks it, the file is not what it says
        why = f"not a readable GGUF file: {type(e).__name__}: {str(e)[:200]}"
        raise CheckpointError("LB0109", why, where=str(path), hint="fetch the file again") from e
    return Contents(str(field.contents()) if field else "unknown", "GGUF", tensors)


def _gguf_tensor(t: Any) -> Stored:
    shape = tuple(int(d) for d in reversed(t.shape))
    return Stored(str(t.name), str(t.tensor_type.name), shape, int(t.n_elements), int(t.n_bytes))


def _hub(model: str) -> Contents:
    source = open_model(model)
    tensors = []
    for name in source.names():
        count, dtype = math.prod(source.shape(name)), source.dtype(name)
        kind = str(dtype).removeprefix("torch.")
        tensors.append(Stored(name, kind, source.shape(name), count, count * dtype.itemsize))
    return Contents(", ".join(source.config.architectures or ["unknown"]), "none", tuple(tensors))
