"""Weights that are sums of terms, for backends whose kernels know none: one matrix of all terms, which meets every
activation once for each.

A group's terms lie side by side in packed form, so the packed matrix is, bit for bit, that of a plain format with so
many times the columns; only the activations have to be repeated, group by group.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lowbit.codegen.backend import Launcher
from lowbit.codegen.spec import KernelSpec
from lowbit.quantizers import qtensor
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["one_matrix", "over_repeated", "repeated", "unserved_sums"]


def one_matrix(spec: KernelSpec) -> KernelSpec:
    """The spec of the plain matrix that `spec`'s packed operands are; `spec` itself where weights are no sums."""
    if spec.terms == 1:
        return spec
    fmt, k = qtensor.one_matrix(spec.fmt, spec.k)
    return replace(spec, format=str(fmt), k=k)


def unserved_sums(spec: KernelSpec) -> str | None:
    """Why activations of sums cannot be repeated before the kernel, or None."""
    if spec.terms > 1 and (spec.activation or spec.norm_eps):
        return "activations of sums are repeated as they are, neither rounded nor normalised first"
    return None


def repeated(spec: KernelSpec, x: torch.Tensor) -> torch.Tensor:
    """[M, K] -> [M, columns of `one_matrix`]: every group of columns once per term, a ragged last one padded."""
    groups = spec.groups // spec.terms
    wide = torch.nn.functional.pad(x, (0, groups * spec.group - spec.k))
    return wide.view(-1, groups, 1, spec.group).expand(-1, -1, spec.terms, -1).reshape(x.shape[0], -1)


def over_repeated(spec: KernelSpec, launch: Launcher) -> Launcher:
    """A launcher for `spec` from one for `one_matrix(spec)`."""
    if spec.terms == 1:
        return launch
    flat = one_matrix(spec)

    def run(x: torch.Tensor, weight: PackedWeight, *rest: Any) -> None:
        launch(repeated(spec, x), replace(weight, fmt=flat.weight_format, k=flat.k), *rest)

    return run
