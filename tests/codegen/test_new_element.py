"""A format nobody has heard of takes one line: everything else finds it by itself."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from _cli import invoke_json
from _cpp import BACKEND, Job, build, launch, spec_of
from safetensors.torch import load_file, save_file

import lowbit.quantizers.formats as formats
from lowbit.codegen.reference.backend import decode_weight, run_reference
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.triton.interpret import Call, run_interpreted
from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import host_target
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.formats import catalog, scalar_format
from lowbit.quantizers.methods import Gptq, Quantized, Rtn
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.weights import from_stored, pack_weights, stored

LINE = "register_element(LevelElement('spot4', (0, .25, .5, 1, 2, 4, 6, 9, -.2, -.4, -.8, -1.5, -3, -5, -7, -10)))"
SOURCE = f"from lowbit.quantizers.formats import LevelElement, register_element\n{LINE}\n"
TEXT = "spot4.g48"


@pytest.fixture
def spot4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An installed package that adds `spot4`, for this process and those it starts."""
    (tmp_path / "spot4_plugin.py").write_text(SOURCE)
    info = tmp_path / "spot4_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spot4-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lowbit.formats]\nspot4 = spot4_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(formats, "ELEMENTS", list(formats.ELEMENTS))
    monkeypatch.delitem(sys.modules, "spot4_plugin", raising=False)  # a second import must register again
    formats._load_installed.cache_clear()
    yield tmp_path
    formats.parse_format.cache_clear()
    formats._load_installed.cache_clear()


def weight_and_stats(n: int = 40, k: int = 100) -> tuple[torch.Tensor, LayerStats]:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(300, k, generator=rng) @ (torch.randn(k, k, generator=rng) / k**0.5 + torch.eye(k))
    x = x.double()
    return torch.randn(n, k, generator=rng) * 0.05, LayerStats(x.T @ x / 300, 300)


def found(q: Quantized) -> QTensor:
    assert isinstance(q.qtensor, QTensor)
    return q.qtensor


def test_before_the_line_nobody_knows_it() -> None:
    with pytest.raises(FormatError, match=r"LB0210.*spot4"):
        scalar_format(TEXT)


def test_one_line_is_enough(spot4: Path) -> None:
    assert TEXT in [str(scalar_format(str(f).replace(".ch", ".g48"))) for f in catalog()]
    rows = {r["element"]: r for r in invoke_json("formats")["formats"]}
    assert rows["spot4"]["bits"] == 4
    assert {"cpp", "triton", "reference"} <= set(rows["spot4"]["backends"])
    weight, stats = weight_and_stats()
    fmt = scalar_format(TEXT)
    rounded, solved = Rtn().quantize(weight, fmt, stats), Gptq().quantize(weight, fmt, stats)
    assert solved.proxy_error < 0.9 * rounded.proxy_error < 0.05
    q = found(solved)
    save_file(stored(q), spot4 / "q.safetensors")
    again = from_stored(fmt, *q.shape, load_file(spot4 / "q.safetensors"))
    assert torch.equal(again.dequantize(), q.dequantize())
    assert torch.equal(decode_weight(pack_weights([q], LAYOUTS["words"])), q.dequantize())


def test_kernels_run_it(spot4: Path) -> None:
    q = found(Rtn().quantize(weight_and_stats()[0], scalar_format(TEXT), None))
    x = torch.eye(100)
    want = q.dequantize().T
    spec = spec_of(TEXT, "float", (40,), 100)
    assert torch.equal(run_reference(spec, x, pack_weights([q], spec.layout_)), want)
    if BACKEND.available(host_target()) is None:
        (run,) = build([Job(spec, host_target().arch, 2, Schedule(2, 16))])
        assert torch.equal(launch(run, spec, x, [q]), want)
    if find_spec("triton") is not None:
        words = type(spec)((40,), 100, TEXT, str(LAYOUTS["words"]), "float")
        call = Call(words, Schedule(32, 64, 64, 4, 3), x, pack_weights([q], words.layout_))
        assert torch.equal(run_interpreted([call])[0], want)
