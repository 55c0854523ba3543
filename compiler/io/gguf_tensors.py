"""What a GGUF file of a quantized checkpoint holds: its tensors under llama.cpp's names, and why it cannot be made."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.checkpoint import Checkpoint
from lowbit.compiler.io.gguf_model import ARCHITECTURES, rope_factors, row_order
from lowbit.compiler.io.gguf_types import BLOCK, BLOCK_BYTES, block_type, misfit, pack_blocks, suggestion, value_misfit
from lowbit.compiler.io.misfits import refusal
from lowbit.quantizers.qtensor import QTensor

__all__ = ["PlannedTensor", "check_layers", "gguf_member", "gguf_package", "planned_tensors"]

_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor to write. kind: name of its GGUF type; size: its numbers; row: uint8 shape of its data."""

    name: str
    kind: str
    size: int
    row: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return math.prod(self.row)


def gguf_package(where: str) -> Any:
    """The module gguf; raises CheckpointError (LB0109), naming `where`, when it is not installed."""
    try:
        import gguf
    except ImportError as e:
        raise CheckpointError(
            "LB0109", "writing GGUF needs the gguf package", where=where, hint="pip install 'lowbit[gguf]'"
        ) from e
    return gguf


def gguf_member(enum: Any, name: str) -> Any:
    """A member of one of gguf's enums; raises CheckpointError (LB0109) when the package is too old to have it."""
    if name not in enum.__members__:
        raise CheckpointError("LB0109", f"the gguf package has no {name}", hint="pip install --upgrade gguf")
    return enum[name]


def check_layers(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Raise CheckpointError (LB0123) for layers that GGUF cannot hold, by their formats first, then by their values;
    LB0114 where no layer is quantized. names: of the model's tensors, in its order."""
    if not checkpoint.modules:
        raise CheckpointError("LB0114", "has no quantized layer", where=str(checkpoint.folder))
    paths = [path for name in names if (path := name.removesuffix(".weight")) in checkpoint.modules]
    for reason in (_misfit, _value_misfit):
        found = {path: why for path in paths if (why := reason(checkpoint, path))}
        if found:
            raise refusal(found, "gguf", str(checkpoint.folder), _advice(checkpoint, next(iter(found))))


def _advice(checkpoint: Checkpoint, path: str) -> str:
    fmt = checkpoint.modules[path]
    if checkpoint.layer_input(path).to_dict():
        return "quantize the original model with `--activation none` and without rotations"
    if block_type(fmt) is not None and checkpoint.shape(path)[1] % BLOCK:
        return "leave such layers out with `ignore`"
    return f"quantize the original model with {suggestion(fmt)}"


def _misfit(checkpoint: Checkpoint, path: str) -> str | None:
    if checkpoint.layer_input(path).to_dict():
        return "its inputs are rounded or rotated, which llama.cpp does not do"
    fmt = checkpoint.modules[path]
    # The shape of some layers is only known from their codes, so it comes last.
    return misfit(fmt, BLOCK) or misfit(fmt, checkpoint.shape(path)[1])


def _value_misfit(checkpoint: Checkpoint, path: str) -> str | None:
    if block_type(checkpoint.modules[path]) not in ("Q4_1", "Q5_1", "MXFP4"):
        return None
    return value_misfit(_matrix(checkpoint, path))


def _matrix(checkpoint: Checkpoint, path: str) -> QTensor:
    q = checkpoint.qtensor(path)
    assert isinstance(q, QTensor)  # `misfit` takes no others
    return q


def planned_tensors(checkpoint: Checkpoint, config: Any, shapes: dict[str, tuple[int, ...]]) -> Iterator[PlannedTensor]:
    """Everything to write, in the model's order. shapes: by name, of the tensors the model has. Raises CheckpointError:
    LB0114 for a tensor that is missing or has another shape, LB0123 for one that GGUF has no name or type for."""
    gguf = gguf_package(str(checkpoint.folder))
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    if (factors := rope_factors(config)) is not None:
        yield PlannedTensor(
            "rope_freqs.weight", "F32", len(factors), (4 * len(factors),), lambda: factors.view(torch.uint8)
        )
    for name, shape in shapes.items():
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise CheckpointError("LB0123", f"GGUF has no name for {name[:200]!r}", where=str(checkpoint.folder))
        path = name.removesuffix(".weight")
        quantized = name.endswith(".weight") and path in checkpoint.modules
        make = _blocks if quantized else _plain
        yield make(checkpoint, path if quantized else name, target, shape, row_order(config, name))


def _blocks(
    checkpoint: Checkpoint, path: str, target: str, shape: tuple[int, ...], order: Tensor | None
) -> PlannedTensor:
    """The weight of a quantized module."""
    kind = block_type(checkpoint.modules[path])
    assert kind is not None

    def load() -> Tensor:
        blocks = pack_blocks(_matrix(checkpoint, path))
        return blocks if order is None else blocks[order]

    _check_shape(checkpoint, path, checkpoint.shape(path), shape)
    return PlannedTensor(target, kind, math.prod(shape), (shape[0], shape[1] // BLOCK * BLOCK_BYTES[kind]), load)


def _plain(
    checkpoint: Checkpoint, name: str, target: str, shape: tuple[int, ...], order: Tensor | None
) -> PlannedTensor:
    """A tensor that is not quantized, exactly as it is."""
    info = checkpoint.info(name)
    _check_shape(checkpoint, name, info.shape, shape)
    if info.dtype not in _FLOATS:
        why = f"{name[:200]} is {info.dtype}, which GGUF does not hold"
        raise CheckpointError("LB0123", why, where=str(checkpoint.folder))
    dtype = torch.float32 if len(shape) == 1 else info.dtype

    def load() -> Tensor:
        value = checkpoint.tensor(name).to(dtype)
        return (value if order is None else value[order]).contiguous().view(torch.uint8)

    row = (*shape[:-1], shape[-1] * dtype.itemsize)
    return PlannedTensor(target, _FLOATS[dtype], math.prod(shape), row, load)


def _check_shape(checkpoint: Checkpoint, name: str, actual: tuple[int, ...], asked: tuple[int, ...]) -> None:
    if tuple(actual) != tuple(asked):
        why = f"is {list(actual)}, the config asks for {list(asked)}"
        raise CheckpointError("LB0114", why, where=f"{checkpoint.folder}: {name}")
