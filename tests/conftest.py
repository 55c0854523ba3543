"""Shared options and settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "lowbit",
    max_examples=int(os.environ.get("LOWBIT_EXAMPLES", "20")),
    deadline=None,  # shared machines stall; a property is not wrong because it was slow
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lowbit")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite the expected half of golden files")


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels built by tests go to a folder of their own, unless one is given."""
    given: Path | None = Path(p) if (p := os.environ.get("LOWBIT_TEST_CACHE")) else None
    before = os.environ.get("LOWBIT_CACHE")
    os.environ["LOWBIT_CACHE"] = str(given or tmp_path_factory.mktemp("kernel-cache"))
    yield
    if before is None:
        os.environ.pop("LOWBIT_CACHE", None)
    else:
        os.environ["LOWBIT_CACHE"] = before
