"""Kernels inside a checkpoint: made by `quantize export`, loaded without a compiler when trusted, else refused."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _cli import invoke_json
from _models import swap_linears, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.compiler.errors import CheckpointError, KernelError
from lowbit.compiler.io.kernels import MANIFEST, read_kernels
from lowbit.compiler.ir.target import Target, host_target
from lowbit.compiler.job.export import LayerKernel, export_kernels, layer_kernels, parse_target
from lowbit.compiler.runtime import dispatch, prebuilt
from lowbit.compiler.runtime.modules import PackedLinear

KEPT = ("lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
IDS = torch.tensor([[5]])
RUN = """
import sys, torch, lowbit
model = lowbit.compile(lowbit.load(sys.argv[1]), max_tokens=1)
print(model(torch.tensor([[5]])).logits.double().sum().item())
"""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    dispatch.reset()
    yield
    dispatch.reset()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose one kernel, for one token, is inside it."""
    folder = tmp_path_factory.mktemp("export")
    model = swap_linears(tiny_llama(num_hidden_layers=1), "int3.g40.sym", KEPT)
    lowbit.save(model, folder / "plain")
    return export_kernels(folder / "plain", folder / "out", [host_target()], max_tokens=1).out


@pytest.fixture
def change(exported: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the checkpoint with other values in its manifest, or in that of its kernel."""

    def changed(frozen: bool = False, **kernel: Any) -> Path:
        out = tmp_path / f"copy{len(list(tmp_path.iterdir()))}"
        shutil.copytree(exported, out)
        values = json.loads((out / MANIFEST).read_text())
        values["frozen"] = frozen
        values["kernels"] = [{**entry, **kernel} for entry in values["kernels"]]
        (out / MANIFEST).write_text(json.dumps(values))
        return out

    return changed


def run(folder: Path, trust: bool | None = True, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = lowbit.load(folder, trust_kernels=trust)(ids).logits
    return out


def came_from(folder: Path) -> bool:
    """Whether every kernel in use is a file of the checkpoint."""
    files = [kernel.artifact for _, kernel in dispatch.loaded_kernels()]
    return bool(files) and all(file is not None and file.is_relative_to(folder) for file in files)


def test_a_trusted_kernel_comes_first_and_gives_the_same(exported: Path, change: Callable[..., Path]) -> None:
    want = run(exported, trust=False)
    assert not came_from(exported)
    dispatch.reset()
    assert torch.equal(run(exported), want)
    assert came_from(exported)
    manifest = read_kernels(exported)
    assert manifest is not None
    assert all(k.error is not None and k.error < 1e-3 and k.tokens == (1,) for k in manifest.kernels)
    dispatch.reset()
    unchecked = change(error=None)  # compiled where it could not run: checked where it can
    run(unchecked)
    assert came_from(unchecked)
    assert all(kernel.error > 0 for _, kernel in dispatch.loaded_kernels())


def test_code_runs_only_when_the_user_says_so(
    exported: Path, change: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lowbit"):
        run(exported, trust=None)
    assert not came_from(exported)
    assert "LOWBIT_TRUST_KERNELS=1" in caplog.text
    frozen = change(frozen=True)
    with pytest.raises(CheckpointError, match="LB0121"):
        run(frozen, trust=None)
    dispatch.reset()
    run(frozen, trust=False)
    assert not came_from(frozen)
    monkeypatch.setenv("LOWBIT_TRUST_KERNELS", "1")
    dispatch.reset()
    model = AutoModelForCausalLM.from_pretrained(frozen)
    with torch.no_grad():
        model(IDS)
    assert came_from(frozen)
    assert prebuilt.frozen()


@pytest.mark.parametrize("what", ["byte", "source", "file"])
def test_altered_kernels_are_refused(
    what: str, change: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = change(source="0" * 64) if what == "source" else change()
    file = next((folder / "kernels").glob("*.so"))
    if what == "byte":
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)
    elif what == "file":
        file.unlink()
    with caplog.at_level(logging.WARNING, "lowbit"):
        run(folder)
    assert caplog.text.count("LB0480") == 1
    assert not came_from(folder)
    dispatch.reset()
    monkeypatch.setenv("LOWBIT_FROZEN", "1")
    with pytest.raises(KernelError, match="LB0480"):
        run(folder)


def test_frozen_names_the_missing_kernel_and_the_command(change: Callable[..., Path], tmp_path: Path) -> None:
    folder = change(frozen=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWBIT_CACHE", str(tmp_path / "empty"))
        run(folder)
        with pytest.raises(KernelError) as seen:
            run(folder, ids=torch.tensor([[1, 2, 3]]))
        assert seen.value.code == "LB0409"
        assert "int3.g40.sym 64 x 96, 4 tokens of f32" in str(seen.value)
        assert f"quantize export {folder} -o OUT --target {host_target()} --tokens 4 --frozen" in str(seen.value)
        dispatch.reset()
        foreign = change(frozen=True, target="sm_80", backend="cuda")
        with pytest.raises(KernelError, match=f"LB0409.*{host_target()}"):
            run(foreign)


def test_frozen_still_takes_what_the_cache_has(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image may be built with its cache filled, and be frozen afterwards."""
    want = run(exported, trust=False)
    dispatch.reset()
    monkeypatch.setenv("LOWBIT_FROZEN", "1")
    assert torch.equal(run(exported, trust=False), want)


@pytest.mark.parametrize(
    "values", [{"file": "../../x.so"}, {"sha256": "x"}, {"tokens": "many"}, {"target": "vax"}, {"schedule": [1]}]
)
def test_a_damaged_manifest(
    values: dict[str, Any], change: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    folder = change(**values)
    with pytest.raises(CheckpointError, match="LB0120"):
        read_kernels(folder)
    with caplog.at_level(logging.WARNING, "lowbit"):
        assert prebuilt.use_kernels(folder, trust=True) is None
    assert "LB0120" in caplog.text
    monkeypatch.setenv("LOWBIT_FROZEN", "1")
    with pytest.raises(CheckpointError, match="LB0120"):
        prebuilt.use_kernels(folder, trust=True)


def test_a_server_without_a_compiler(change: Callable[..., Path], tmp_path: Path) -> None:
    folder = change(frozen=True)
    with torch.no_grad():
        want = lowbit.compile(lowbit.load(folder, trust_kernels=True), max_tokens=1)(IDS).logits.double().sum().item()
    bare = {"PATH": str(tmp_path), "CXX": "/nonexistent", "LOWBIT_CACHE": str(tmp_path / "cache")}
    env = {**os.environ, **bare, "LOWBIT_TRUST_KERNELS": "1"}
    done = subprocess.run([sys.executable, "-c", RUN, str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == want
    assert "reference" not in done.stderr
    assert not (tmp_path / "cache").exists()


def test_every_kernel_a_compiled_model_asks_for_is_enumerated() -> None:
    model = swap_linears(tiny_llama(), "int4.g32.asym")
    single = {m.key for m in model.modules() if isinstance(m, PackedLinear)}
    found = [layer.spec(host_target(), "f32").key() for layer in layer_kernels(model)]
    fused = {m.key for m in model.modules() if isinstance(m, PackedLinear)}
    assert single | fused == set(found)
    assert len(single | fused) == len(found) > len(single)


def test_targets() -> None:
    assert parse_target("sm_90a") == Target("cuda", "sm_90")
    assert [str(t) for t in prebuilt.runnable_targets(Target("cuda", "sm_86"))][:2] == ["sm_86", "sm_85"]
    assert str(prebuilt.runnable_targets(Target("cuda", "sm_86"))[-1]) == "sm_80"
    assert prebuilt.runnable_targets(Target("cuda", "sm_90")) == [Target("cuda", "sm_90")]
    assert prebuilt.runnable_targets(host_target())[-1] == Target("cpu", "generic")
    spec = LayerKernel((64,), 96, "int4.g32.sym").spec(Target("cuda", "sm_90"), "bf16")
    assert (spec.compute, spec.layout_.container) == ("float", 32)
    with pytest.raises(KernelError, match="LB0405"):
        parse_target("ref")


def test_command_line(exported: Path, tmp_path: Path) -> None:
    report = invoke_json("export", exported, "-o", tmp_path / "again", "--tokens", 1, "--frozen")
    assert report["kernels"] == 1
    assert report["unchecked"] == 0
    assert report["targets"] == {str(host_target()): 1}
    manifest = read_kernels(tmp_path / "again")
    assert manifest is not None
    assert manifest.frozen
    assert all(manifest.path(kernel).is_file() for kernel in manifest.kernels)


@pytest.mark.slow
def test_cubins_without_a_gpu(exported: Path, tmp_path: Path) -> None:
    from lowbit.codegen.cuda.toolchain import find_nvcc

    if find_nvcc() is None:
        pytest.skip("nvcc was not found")
    report = export_kernels(exported, tmp_path / "gpu", [parse_target("sm_90a")], max_tokens=2, dtype=torch.bfloat16)
    assert {k.backend for k in report.kernels} == {"cuda"}
    assert all(k.error is None or torch.cuda.is_available() for k in report.kernels)
    manifest = read_kernels(tmp_path / "gpu")
    assert manifest is not None
    assert all(manifest.path(k).read_bytes()[:4] == b"\x7fELF" for k in manifest.kernels)


def test_layers_are_prepared_once(exported: Path) -> None:
    """Enumerating kernels leaves a model that still runs."""
    model: nn.Module = lowbit.load(exported, trust_kernels=True)
    layer_kernels(model)
    with torch.no_grad():
        assert torch.isfinite(model(IDS).logits).all()
