"""How a rewrite changes a checkpoint: per tensor, a list of steps on its rows or columns, in float64.

Nothing is computed when an edit is made. A tensor is read, changed and handed on when somebody asks for it, so a model
of any size can be rewritten in the memory of one tensor. Vectors are rows here: a rotation Q takes x to x Q.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowbit.quantizers.hadamard import hadamard, rotate

__all__ = ["Edits", "Fill", "Gather", "Rotation", "Scale", "Step", "TensorEdit", "Turn"]


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix [size, size]: Hadamard's, over sqrt(size).

    seed: of the random signs that come before it (None: no signs), which keep it from lining up with what the model
    has learned ("QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", Ashkboos et al.). fixed: followed by the
    reflection that maps the image of the vector of ones back onto it; such a rotation commutes with subtracting the
    mean, so it passes through layer norms.
    """

    size: int
    seed: int | None = None
    fixed: bool = False

    def turn(self, x: Tensor) -> Tensor:
        """x [..., size] @ Q, in x's dtype."""
        return self._reflected(rotate(self._signed(x), self.size))

    def back(self, x: Tensor) -> Tensor:
        """x [..., size] @ Q^T: undoes `turn`."""
        h = hadamard(self.size).to(x)
        return self._signed(self._reflected(x) @ h * self.size**-0.5)

    def _signed(self, x: Tensor) -> Tensor:
        if self.seed is None:
            return x
        coins = torch.randint(0, 2, (self.size,), generator=torch.Generator().manual_seed(self.seed))
        return x * (2 * coins - 1).to(x)

    def _reflected(self, x: Tensor) -> Tensor:
        if not self.fixed:
            return x
        ones = x.new_ones(self.size)
        mirror = rotate(self._signed(ones), self.size) - ones
        size = float(mirror.dot(mirror))
        reflected: Tensor = x - (2 / size) * (x @ mirror)[..., None] * mirror if size > 1e-9 else x
        return reflected


@dataclass(frozen=True, eq=False)
class Scale:
    """Multiply along `axis` by the vector `by`."""

    axis: int
    by: Tensor

    def apply(self, t: Tensor) -> Tensor:
        """The changed tensor."""
        shape = [1] * t.dim()
        shape[self.axis] = -1
        return t * self.by.to(t).reshape(shape)


@dataclass(frozen=True, eq=False)
class Gather:
    """Take entries along `axis` in `order`: place i holds what was at order[i]."""

    axis: int
    order: Tensor

    def apply(self, t: Tensor) -> Tensor:
        """The changed tensor."""
        return t.index_select(self.axis, self.order)


@dataclass(frozen=True, eq=False)
class Turn:
    """Rotate along `axis`, which may hold several blocks of the rotation's size (heads); `inverse`: back."""

    axis: int
    rotation: Rotation
    inverse: bool = False

    def apply(self, t: Tensor) -> Tensor:
        """The changed tensor."""
        last = t.movedim(self.axis, -1)
        turn = self.rotation.back if self.inverse else self.rotation.turn
        turned = turn(last.unflatten(-1, (-1, self.rotation.size))).flatten(-2)
        return turned.movedim(-1, self.axis)


@dataclass(frozen=True, eq=False)
class Fill:
    """Set everything to one value."""

    value: float

    def apply(self, t: Tensor) -> Tensor:
        """The changed tensor."""
        return torch.full_like(t, self.value)


Step = Scale | Gather | Turn | Fill


@dataclass(frozen=True, eq=False)
class TensorEdit:
    """What becomes of one tensor: `steps` on what `source` holds. offset: added before them and taken off after, for
    norms that multiply by one plus their weight."""

    source: str
    steps: tuple[Step, ...] = ()
    offset: float = 0.0

    def apply(self, tensor: Tensor) -> Tensor:
        """The changed tensor: float32, computed in float64."""
        t = tensor.double() + self.offset
        for step in self.steps:
            t = step.apply(t)
        return (t - self.offset).float().contiguous()


@dataclass
class Edits:
    """Edits by tensor name, in the making. untied: names of tensors that are copies of another's from here on."""

    tensors: dict[str, TensorEdit] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)

    def add(self, name: str, *steps: Step, offset: float = 0.0) -> None:
        """More steps for the tensor `name`."""
        edit = self.tensors.get(name, TensorEdit(name, (), offset))
        self.tensors[name] = replace(edit, steps=(*edit.steps, *steps))

    def untie(self, name: str, source: str) -> None:
        """From here on there is a tensor `name`, which begins as a copy of `source`."""
        self.tensors[name] = TensorEdit(source)
        self.untied.append(name)

    def rows(self, path: str, weights: Mapping[str, str], biases: Mapping[str, str], step: Step) -> None:
        """A step on axis 0 of a linear layer's weight and bias."""
        self.add(weights[path], step)
        if path in biases:
            self.add(biases[path], step)

    def __bool__(self) -> bool:
        return bool(self.tensors)
