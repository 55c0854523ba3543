"""Predicted times: the page is made from the data, the grid is whole, and neither can be taken for a measurement."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture
def predict(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import predict  # type: ignore[import-not-found]

    return predict


def test_the_page_is_made_from_the_data(predict: ModuleType) -> None:
    values = json.loads(predict.RESULTS.read_text())
    assert predict.TABLES.read_text(encoding="utf-8") == predict.tables(values)
    assert values["what"].startswith("PREDICTIONS")
    assert "Nothing here was measured" in predict.TABLES.read_text(encoding="utf-8")
    assert all("predicted_us" in row and "us" not in row for row in values["predictions"])
    cells = {(row["layer"], row["format"], row["M"]) for row in values["predictions"]}
    assert cells == {(layer.name, f, m) for layer in predict.LAYERS for f in predict.FORMATS for m in predict.TOKENS}


def test_a_prediction_is_what_selection_would_take(predict: ModuleType) -> None:
    row = predict.predictions(predict.Layer("small", 512, 256), "int4.g128.sym", 16)
    assert row["predicted_us"] == row["by_backend_us"]["cuda"]
    assert {"cuda", "triton"} == set(row["by_backend_us"])  # too few tokens for the library
    # Nothing is faster than reading the packed weights.
    assert row["predicted_tb_per_s"] * 1e12 < predict.gpu_of(predict.H200).bandwidth
    dense = predict.dense_seconds(predict.Layer("square", 8192, 8192), 4096)
    assert 5e-4 < dense < 1e-3
