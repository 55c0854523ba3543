"""Checkpoints are tested on the reference backend: kernels have tests of their own, and compiling takes time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lowbit.compiler.runtime.dispatch import reset


@pytest.fixture(scope="module", autouse=True)
def _reference_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWBIT_BACKENDS", "reference")
        reset()
        yield
        reset()
