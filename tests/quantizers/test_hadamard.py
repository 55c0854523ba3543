"""Hadamard matrices and the fast transform."""

from __future__ import annotations

import pytest
import torch

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.hadamard import BASES, hadamard, largest_order, rotate, split_order


@pytest.mark.parametrize("n", [*BASES, 2, 4, 24, 40, 64, 96, 128, 320, 576, 896, 1536])
def test_rows_are_orthogonal(n: int) -> None:
    h = hadamard(n)
    assert set(h.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(h @ h.T, n * torch.eye(n))


@pytest.mark.parametrize("n", [1, 8, 12, 36, 96, 576])
def test_the_fast_transform_is_the_matrix_product(n: int) -> None:
    x = torch.randn(3, 5, 2 * n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    blocks = x.unflatten(-1, (2, n)) @ hadamard(n).double().T / n**0.5
    torch.testing.assert_close(rotate(x, n), blocks.flatten(-2), rtol=0, atol=1e-12)


def test_sizes_of_models() -> None:
    assert split_order(576) == (36, 16)  # SmolLM2's hidden size
    assert split_order(1536) == (12, 128)  # and the width of its MLP
    assert split_order(14336) == (28, 512)  # Llama 3 8B's MLP
    assert split_order(13824) == (108, 128)  # Llama 2 13B's
    assert largest_order(9 * 64) == 576


@pytest.mark.parametrize("n", [0, 3, 9, 10, 52, 11008])
def test_unknown_orders_are_declined(n: int) -> None:
    with pytest.raises(FormatError, match="LB0242"):
        split_order(n)
