"""Rotation: an orthogonal change of basis spreads outliers over all channels, those of activations and of weights.

After "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (Ashkboos et al.). The residual stream is rotated by a
Hadamard matrix with random signs, which goes into every table, norm and layer that touches it; the values of attention
are rotated head by head, which goes into the value and output layers; and the inputs of down projections are rotated at
run time. QuaRot's rotation across heads is left out, as it needs a Hadamard matrix of the number of heads. Models with
layer norms are rotated too: by a rotation that keeps the vector of ones, and so the mean. Where only weights are
rounded, what happens at run time is left out, and the rest is "incoherence processing" ("QuIP: 2-Bit Quantization of
Large Language Models With Guarantees", Chee et al.) that costs nothing when the model runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.sites import Norm, Rows, Site, Stream, Structure, Values
from lowbit.quantizers.hadamard import largest_order, split_order
from lowbit.quantizers.rewrites.base import Decisions, Outcome, Rewrite, Scene
from lowbit.quantizers.rewrites.edits import Edits, Fill, Rotation, Scale, Turn

__all__ = ["Rotate"]


@dataclass(frozen=True)
class Rotate(Rewrite):
    """seed: of the random signs. online: rotate the inputs of down projections at run time, in the widest blocks that
    a Hadamard matrix fits, where they are rounded. heads: rotate the values of attention, head by head."""

    seed: int = 0
    online: bool = True
    heads: bool = True

    name: ClassVar[str] = "rotate"
    observes: ClassVar[bool] = False
    serves_weights: ClassVar[bool] = True

    @staticmethod
    def unties(structure: Structure) -> dict[str, str]:
        """Tables by the path of the layer that shares one: rotated, its weight is another matrix than the table."""
        tables = structure.stream.tables if structure.stream is not None else ()
        return {path: name for path, name in structure.weights.items() if name in tables}

    def outcome(self, scene: Scene, decided: Decisions) -> Outcome:
        result, structure = Outcome(), scene.structure
        problem = _stream_problem(scene)
        if problem:
            result.declined.append(f"the residual stream is not rotated: {problem}")
        else:
            assert structure.stream is not None
            self._rotate_stream(scene, structure.stream, result.edits)
        for site in scene.quantized_sites():
            self._rotate_site(scene, site, result)
        return result

    def _rotate_stream(self, scene: Scene, stream: Stream, edits: Edits) -> None:
        structure = scene.structure
        turn = Rotation(stream.width, self.seed, fixed=any(n.centered for n in stream.norms))
        weights = dict(structure.weights)
        for path, name in self.unties(structure).items():
            weights[path] = f"{path}.weight"
            edits.untie(weights[path], name)
        for table in stream.tables:
            edits.add(table, Turn(1, turn))
        for norm in stream.norms:
            gamma = scene.tensor(norm.weight).double() + norm.offset
            for path in structure.readers(norm):
                edits.add(weights[path], Scale(1, gamma), Turn(1, turn))
            edits.add(norm.weight, Fill(1.0), offset=norm.offset)
            if norm.bias is not None:
                edits.add(norm.bias, Scale(0, 1 / gamma), Turn(0, turn))
        for path in stream.writers:
            edits.rows(path, weights, structure.biases, Turn(0, turn))

    def _rotate_site(self, scene: Scene, site: Site, result: Outcome) -> None:
        structure, producer = scene.structure, site.producer
        if isinstance(producer, Norm):
            return
        if isinstance(producer, Values) and self.heads:
            if _order(producer.dim):
                turn = Rotation(producer.dim)
                result.edits.rows(producer.value, structure.weights, structure.biases, Turn(0, turn))
                for path in site.consumers:
                    result.edits.add(structure.weights[path], Turn(1, turn))
                return
            result.declined.append(f"{site.name} is not rotated: no Hadamard matrix of {producer.dim} channels a head")
        elif self.online and (isinstance(producer, Rows) or producer is None):
            block, rounded = largest_order(site.width), [p for p in site.consumers if scene.activation(p) is not None]
            if not rounded:
                return
            if len(rounded) < len(site.consumers) or any(map(structure.shared, rounded)):
                result.declined.append(f"{site.name} is not rotated: one of its readers stays as it is")
                return
            if block < 4:
                result.declined.append(f"{site.name} is not rotated: no Hadamard matrix divides {site.width} channels")
                return
            for path in site.consumers:
                result.edits.add(structure.weights[path], Turn(1, Rotation(block)))
                result.online[path] = block


def _order(n: int) -> bool:
    try:
        split_order(n)
    except FormatError:
        return False
    return True


def _stream_problem(scene: Scene) -> str:
    """Why the stream cannot be rotated, or an empty text."""
    stream = scene.structure.stream
    if stream is None:
        return scene.structure.problem
    if not _order(stream.width):
        return f"no Hadamard matrix of order {stream.width} is known"
    shared = [
        p for p in scene.structure.weights
        if scene.structure.shared(p) and scene.structure.weights[p] not in stream.tables
    ]  # fmt: skip
    if shared:
        return f"{shared[0]} shares its weight with another layer"
    for norm in stream.norms:
        if norm.bias is not None and _ill(scene.tensor(norm.weight).double() + norm.offset):
            return f"weights of {norm.path} are too close to zero to divide its bias by"
    return ""


def _ill(gamma: Tensor) -> bool:
    size = gamma.abs()
    return bool(size.min() < 1e-4 * size.max()) or not bool(torch.isfinite(size).all())
