"""Tests marked `gpu` are skipped, with the reason, where there is no CUDA device."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() and find_spec("triton") is not None:
        return
    missing = "triton is not installed" if torch.cuda.is_available() else "torch finds no CUDA device"
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=missing))
