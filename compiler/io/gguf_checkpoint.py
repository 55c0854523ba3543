"""A GGUF file as a quantized checkpoint: blocks become lowbit's codes and scales, and everything else is dequantized.

transformers knows what the tensors are called and which rows of queries and keys llama.cpp has in another order. What
that order is is found out here by giving it the rows' numbers, so that it is said in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.gguf_blocks import BLOCK_TYPES, read_blocks
from lowbit.compiler.io.safetensors_file import TensorInfo
from lowbit.compiler.io.source import ModelSource
from lowbit.compiler.io.source_gguf import GGUFSource, RawTensor
from lowbit.quantizers.formats import Format
from lowbit.quantizers.qtensor import QTensor

__all__ = ["BlockReader", "GGUFTensors", "open_gguf"]


@dataclass(frozen=True)
class BlockReader:
    """The tensors of each module -> its weight (a `checkpoint.Reader`). matrices: by module path."""

    matrices: Mapping[str, RawTensor]

    def format(self, path: str) -> Format:
        """What a module's weight becomes."""
        return BLOCK_TYPES[self.matrices[path].kind].format

    def notes(self) -> tuple[str, ...]:
        """Which types do not become exactly their numbers."""
        rounded = sorted({t.kind for t in self.matrices.values() if not BLOCK_TYPES[t.kind].exact})
        what = f"scales and minima of {', '.join(rounded)} are rounded to float16, to 2**-11 of themselves"
        return (what,) if rounded else ()

    def suffixes(self, path: str) -> tuple[str, ...]:
        """Names of a module's tensors."""
        return ("weight",)

    def shape(self, path: str) -> tuple[int, int] | None:
        """(N, K)."""
        n, width = self.matrices[path].rows.shape
        kind = BLOCK_TYPES[self.matrices[path].kind]
        return n, width // kind.nbytes * kind.columns

    def weight(self, path: str, tensors: Mapping[str, Tensor], where: str) -> QTensor:
        """The weight in its blocks' format; raises CheckpointError (LB0122) for blocks that no format holds."""
        kind = self.matrices[path].kind
        try:
            return read_blocks(kind, tensors["weight"])
        except ValueError as e:
            raise _refused(f"its blocks of type {kind} cannot be kept: {e}", where) from e


@dataclass(frozen=True)
class GGUFTensors:
    """The tensors of a file under the model's names. Those of quantized modules are blocks, uint8 [N, bytes of a row],
    rows in the model's order; matrices that are not are float16, everything else float32."""

    source: ModelSource
    matrices: Mapping[str, RawTensor]

    def info(self, name: str) -> TensorInfo:
        """Type, shape, and a span as long as the data."""
        if (matrix := self._matrix(name)) is not None:
            return TensorInfo(torch.uint8, tuple(matrix.rows.shape), 0, matrix.rows.size)
        shape, dtype = self.source.shape(name), self._dtype(name)
        return TensorInfo(dtype, shape, 0, torch.Size(shape).numel() * dtype.itemsize)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        matrix = self._matrix(name)
        return self.source.tensor(name).to(self._dtype(name)) if matrix is None else matrix.read()

    def _matrix(self, name: str) -> RawTensor | None:
        path, _, leaf = name.rpartition(".")
        return self.matrices.get(path) if leaf == "weight" else None

    def _dtype(self, name: str) -> torch.dtype:
        kept = self.source.kept_dtype if len(self.source.shape(name)) > 1 else None
        return kept or self.source.dtype(name)


def open_gguf(path: Path) -> tuple[GGUFSource, GGUFTensors, BlockReader]:
    """A file's model, its tensors, and what reads its quantized linear layers.

    Raises CheckpointError: LB0109 for a file that transformers cannot read, LB0114 for one without quantized layers,
    LB0122 for blocks that no format holds.
    """
    source = GGUFSource(path)
    raw = source.raw_tensors()
    if raw is None:
        why = "the tensors of this architecture are regrouped, which lowbit only does with numbers"
        raise _refused(why, str(path))
    linears = {f"{name}.weight": m for name, m in source.empty_model().named_modules() if isinstance(m, nn.Linear)}
    found = {n.removesuffix(".weight"): t for n, t in raw.items() if n in linears}
    _check(found, str(path))
    return source, GGUFTensors(source, found), BlockReader(found)


def _check(found: Mapping[str, RawTensor], where: str) -> None:
    if not found:
        raise CheckpointError(
            "LB0114", "has no quantized linear layer", where=where, hint="quantize it with `quantize run`"
        )
    unknown: dict[str, list[str]] = {}
    for layer, tensor in found.items():
        if tensor.kind not in BLOCK_TYPES:
            unknown.setdefault(tensor.kind, []).append(layer)
    if unknown:
        kind, layers = next(iter(unknown.items()))
        more = f" and {len(unknown) - 1} more types" if len(unknown) > 1 else ""
        raise _refused(f"{len(layers)} layers ({layers[0]} ...) are {kind}{more}, which no format holds", where)


def _refused(why: str, where: str) -> CheckpointError:
    hint = f"`quantize run` reads its numbers and quantizes them again; blocks that are kept: {', '.join(BLOCK_TYPES)}"
    return CheckpointError("LB0122", why, where=where, hint=hint)
