"""Predicted times against those of the committed measurements: nothing is timed here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
from _cpp import BACKEND, spec_of

from lowbit.codegen.schedule import Schedule
from lowbit.compiler.ir.target import Target

RESULTS = Path(__file__).resolve().parents[3] / "bench" / "results"


def measured(target: str) -> Iterator[tuple[str, float]]:
    """(what, predicted over measured time) of every kernel of one thread that was measured on `target`.

    The machine was shared: the 5th percentile of the calls is what a kernel takes when others let it.
    """
    for path in sorted(RESULTS.glob("cpu*.json")):
        table = json.loads(path.read_text())
        if table["machine"]["target"] != target:
            continue
        for row in table["kernels"]:
            if row["threads"] == 1 and "schedule" in row:
                rest = {"x_dtype": "bf16", "out_dtype": "bf16", "activation": row.get("activation", "")}
                spec = spec_of(row["format"], row["compute"], (row["N"],), row["K"], Target.parse(target).arch, **rest)
                seconds = BACKEND.predict(spec, Schedule.from_dict(row["schedule"]), Target.parse(target), row["M"])
                what = f"{path.name}: {row['format']} {row['compute']} M={row['M']} {row['N']}x{row['K']}"
                yield what, seconds * 1e6 / row["us_p5"]


@pytest.mark.parametrize("target", ["cpu-avx512bf16", "cpu-avx512vbmi", "cpu-avx512vnni", "cpu-avx2"])
def test_predictions_are_within_a_quarter_of_the_measured_table(target: str) -> None:
    found = dict(measured(target))
    if not found:
        pytest.skip(f"no measurements in {RESULTS}")
    far = {what: round(ratio, 2) for what, ratio in found.items() if not 0.75 <= ratio <= 1.25}
    assert len(far) <= len(found) // 50, far  # a row in fifty may have been disturbed
    assert statistics.median(abs(ratio - 1) for ratio in found.values()) < 0.1
