"""Hadamard rotations: orthogonal, built of additions, and they spread outliers over all channels.

Orders n = m * 2**p with m from `BASES`: the Kronecker product of a matrix by Paley ("On Orthogonal Matrices", 1933)
and Sylvester's. Used as in "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs": activations and the input side of
weights are rotated alike, which leaves every product as it is.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lowbit.compiler.errors import FormatError

__all__ = ["BASES", "hadamard", "largest_order", "rotate", "split_order"]

BASES = {1: 0, 12: 11, 20: 19, 28: 13, 36: 17, 44: 43, 60: 59, 76: 37, 84: 83, 108: 107, 140: 139, 148: 73}
"""Order of a base matrix -> the prime q it is made from: order q + 1 where q % 4 == 3, else 2 * (q + 1)."""


def split_order(n: int) -> tuple[int, int]:
    """(base order, power of two) with n as their product; raises FormatError (LB0242) when no such matrix is known."""
    for base in sorted(BASES, reverse=True):
        power, rest = divmod(n, base)
        if n > 0 and not rest and power & (power - 1) == 0:
            return base, power
    raise FormatError(
        "LB0242",
        f"no Hadamard matrix of order {n} is known",
        hint="use a power of two, or one times " + ", ".join(str(b) for b in BASES if b > 1),
    )


def largest_order(k: int) -> int:
    """The largest order that divides `k`: how wide the blocks of a row of `k` numbers can be rotated.

    >>> largest_order(576), largest_order(1536), largest_order(9 * 64)
    (576, 1536, 576)
    """
    power = k & -k
    return max(base * (1 << p) for base in BASES for p in range(power.bit_length()) if k % (base << p) == 0)


@cache
def hadamard(n: int) -> Tensor:
    """float32 [n, n] of +1 and -1 with H @ H.T = n I. Raises FormatError (LB0242) for unknown orders."""
    base, power = split_order(n)
    matrix = _paley(base)
    sylvester = torch.ones(1, 1)
    while sylvester.shape[0] < power:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), sylvester)
    return torch.kron(matrix, sylvester)


def _paley(order: int) -> Tensor:
    if order == 1:
        return torch.ones(1, 1)
    q = BASES[order]
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)])
    jacobsthal = character[(torch.arange(q)[:, None] - torch.arange(q)[None, :]) % q]
    core = torch.zeros(q + 1, q + 1)
    core[0, 1:], core[1:, 0], core[1:, 1:] = 1.0, (-1.0 if q % 4 == 3 else 1.0), jacobsthal
    eye = torch.eye(q + 1)
    if q % 4 == 3:  # the core is skew
        return core + eye
    return torch.kron(core, torch.tensor([[1.0, 1.0], [1.0, -1.0]])) + torch.kron(
        eye, torch.tensor([[1.0, -1.0], [-1.0, -1.0]])
    )


def rotate(x: Tensor, n: int) -> Tensor:
    """x [..., K] with every block of `n` columns multiplied by `hadamard(n)` / sqrt(n), in x's dtype.

    (x rotated) @ (w rotated).T is x @ w.T. n divides K. n log n operations a block, in float32, or float64 for float64.
    """
    base, power = split_order(n)
    if x.shape[-1] % n:
        raise FormatError("LB0242", f"blocks of {n} do not divide {x.shape[-1]} columns")
    y = x.double() if x.dtype == torch.float64 else x.float()
    y = y.reshape(-1, base, power)
    width = 1
    while width < power:
        pair = y.reshape(-1, base, power // (2 * width), 2, width)
        y = torch.stack([pair[..., 0, :] + pair[..., 1, :], pair[..., 0, :] - pair[..., 1, :]], dim=-2)
        y, width = y.reshape(-1, base, power), 2 * width
    if base > 1:
        y = hadamard(base).to(device=y.device, dtype=y.dtype) @ y
    rotated: Tensor = (y * n**-0.5).reshape(x.shape).to(x.dtype)
    return rotated
