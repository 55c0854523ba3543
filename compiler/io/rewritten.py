"""A model seen through edits of its tensors: what a rewrite makes of a checkpoint, without a second copy of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.source import ModelSource
from lowbit.quantizers.rewrites.edits import Edits, TensorEdit

__all__ = ["RewrittenSource", "rewrite_module"]


class RewrittenSource(ModelSource):
    """`base` with `edits` applied to each tensor when it is read.

    Edited tensors are read in float32 and written in the type they had. A head that is no longer its embedding is a
    tensor of its own, and the config says so.
    """

    def __init__(self, base: ModelSource, edits: Edits) -> None:
        self._base, self._edits = base, edits
        self.config = base.config
        self.origin, self.base_model, self.notes = base.origin, base.base_model, base.notes
        self.kept_dtype, self.licence = base.kept_dtype, base.licence
        if edits.untied:
            self.config = copy.deepcopy(base.config)
            self.config.tie_word_embeddings = False

    def names(self) -> list[str]:
        return [*self._base.names(), *self._edits.untied]

    def _edit(self, name: str) -> TensorEdit:
        return self._edits.tensors.get(name) or TensorEdit(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(self._edit(name).source)

    def dtype(self, name: str) -> torch.dtype:
        return self._base.dtype(self._edit(name).source)

    def tensor(self, name: str) -> torch.Tensor:
        edit = self._edits.tensors.get(name)
        return self._base.tensor(name) if edit is None else edit.apply(self._base.tensor(edit.source))

    def extras(self) -> list[Path]:
        return self._base.extras()

    def tokenizer(self) -> Any:
        return self._base.tokenizer()

    def digest(self) -> str:
        """The base's: the edits follow from it and from the run's settings."""
        return self._base.digest()


@torch.no_grad()
def rewrite_module(model: nn.Module, edits: Edits) -> None:
    """Apply edits to a model in memory, in place.

    Raises CheckpointError (LB0114) when the model has no tensor of a name.
    """
    state: Mapping[str, torch.Tensor] = model.state_dict(keep_vars=True)
    missing = [e.source for e in edits.tensors.values() if e.source not in state]
    if missing:
        raise CheckpointError("LB0114", "the model has no such tensor", where=missing[0])
    # Copies begin as their source was, so they are made first.
    for name in edits.untied:
        source = state[edits.tensors[name].source]
        owner, _, leaf = name.rpartition(".")
        value = edits.tensors[name].apply(source.detach()).to(source.dtype)
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(value, requires_grad=source.requires_grad))
    if edits.untied and hasattr(model, "config"):
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]
    for name, edit in edits.tensors.items():
        if name not in edits.untied:
            state[name].data = edit.apply(state[name].detach().cpu()).to(state[name])
