"""What every writer of checkpoints does alike: the parts of quantized modules, and the files carried along."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.write import Blob, Part
from lowbit.quantizers.formats import WeightFormat
from lowbit.quantizers.weights import QWeight

__all__ = ["MARGIN", "SHARD_BYTES", "copy_extras", "quantized_part", "scale_part"]

SHARD_BYTES = 2_000_000_000
"""Size from which a checkpoint has several files of tensors."""
MARGIN = 1_000_000
"""Bytes for headers, configs and the card, on top of tensors and carried files."""


def quantized_part(path: str, load: Callable[[], QWeight], fmt: WeightFormat, n: int, k: int, form: Any) -> Part:
    """The tensors of the module `path`, whose weight is [n, k] in `fmt`.

    form: the module that turns matrices into the layout's tensors (`tensor_shapes`, `to_tensors`). Loading the part
    raises CheckpointError (LB0114) when the weight is another one.
    """

    def tensors() -> dict[str, torch.Tensor]:
        q = load()
        if q.fmt != fmt or q.shape != (n, k):
            raise CheckpointError(
                "LB0114", f"expected {fmt} {n}x{k}, got {q.fmt} {q.shape[0]}x{q.shape[1]}", where=path
            )
        return {f"{path}.{name}": tensor for name, tensor in form.to_tensors(q).items()}

    shapes = form.tensor_shapes(fmt, n, k)
    return Part(tuple(Blob(f"{path}.{name}", dtype, shape) for name, (dtype, shape) in shapes.items()), tensors)


def scale_part(path: str, scale: torch.Tensor) -> Part:
    """The static scales of a module's inputs, float32."""
    name = f"{path}.input_scale"
    return Part((Blob(name, torch.float32, tuple(scale.shape)),), lambda: {name: scale.float()})


def copy_extras(extras: Iterable[Path], stage: Path) -> None:
    """Copy the files that `source_folder.carried_files` found into the folder `stage`."""
    for path in extras:
        folder = stage / path.parent.name if path.parent.name == "additional_chat_templates" else stage
        folder.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / path.name)
