"""Fixtures of the quantizers' tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch import Tensor

from lowbit.quantizers.calibration import LayerStats

sys.path.insert(0, str(Path(__file__).parent))  # test folders are no packages; this one has shared modules


@pytest.fixture(scope="session")
def real_matrices() -> dict[str, tuple[Tensor, LayerStats]]:
    """See `_real.real_cases`."""
    from _real import real_cases

    return real_cases()
