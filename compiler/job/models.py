"""Any model a user can name, ready to run: an original (folder, GGUF, hub id) or a quantized checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.compiler.errors import CheckpointError, RunError
from lowbit.compiler.io.source import ModelSource, open_model

__all__ = ["AnyModel", "check_same_vocabulary", "find_model", "is_quantized", "load_dense"]


def is_quantized(model: str | Path) -> bool:
    """True for a folder whose config.json has a `quantization_config`."""
    path = Path(model) / "config.json"
    try:
        return "quantization_config" in json.loads(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def load_dense(source: ModelSource, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of `source` in memory, every tensor in `dtype`."""
    model = source.empty_model()
    tensors = {name: source.tensor(name).to(dtype) for name in source.names()}
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()  # type: ignore[operator]
    empty = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    if empty:
        raise CheckpointError("LB0152", f"no tensor for {', '.join(empty[:3])}", where=source.origin)
    return model.to(dtype).eval()


@dataclass(frozen=True)
class AnyModel:
    """A model that was found and checked, but not loaded. `source` is None for a quantized checkpoint."""

    name: str
    source: ModelSource | None

    def tokenizer(self) -> Any:
        """Its tokenizer; raises CheckpointError (LB0117) when it has none."""
        if self.source is not None:
            return self.source.tokenizer()
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.name, trust_remote_code=False, local_files_only=True)
        except Exception as e:  # transformers raises a dozen kinds; to the user they are one
            raise CheckpointError("LB0117", f"no usable tokenizer: {str(e)[:200]}", where=self.name) from e

    def load(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The model in memory; a quantized one on lowbit's kernels, with activations in `dtype`."""
        if self.source is not None:
            return load_dense(self.source, dtype)
        from lowbit.compiler.io.hf import load_quantized

        return load_quantized(Path(self.name), dtype=dtype)


def find_model(model: str | Path) -> AnyModel:
    """The model called `model`, headers checked; errors as `open_model`, but a quantized folder is welcome."""
    name = str(model)
    return AnyModel(name, None) if is_quantized(model) else AnyModel(name, open_model(model))


def check_same_vocabulary(model: Any, reference: Any) -> None:
    """Raise RunError (LB0542) when two loaded models cannot be compared token by token."""
    sizes = [int(m.config.vocab_size) for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise RunError(
            "LB0542",
            f"the models have {sizes[0]} and {sizes[1]} tokens",
            hint="compare a model with the one it was made from",
        )
