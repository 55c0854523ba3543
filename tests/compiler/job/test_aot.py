"""`lowbit.export`: a captured graph is fused, and the same function; a package needs no compiler or says why not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from _models import swap_linears, tiny_llama
from torch import nn

import lowbit
from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.compiler.errors import LowbitError
from lowbit.compiler.io.kernels import MANIFEST
from lowbit.compiler.job.aot import kernels_of, lower
from lowbit.compiler.runtime import dispatch
from lowbit.compiler.runtime.package import CALL, PACKAGE, describe_call


class Block(nn.Module):
    """A gated feed-forward part with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return out


def _block() -> nn.Module:
    torch.manual_seed(0)
    model = swap_linears(Block().requires_grad_(False), "int4.g32.sym")
    return model.eval()


X = torch.linspace(-2, 2, 96).reshape(3, 32)


def test_exported_graphs_are_fused_and_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    dispatch.reset()
    model = _block()
    want = model(X)
    tokens = torch.export.Dim("tokens", min=1, max=64)
    exported = torch.export.export(model, (X,), dynamic_shapes=({0: tokens},)).run_decompositions({})
    gm, fused, kept = lower(exported.module(check_guards=False))
    specs = kernels_of(torch.export.export(gm, (X.bfloat16(),)).graph)
    assert fused == [
        "gate + up: one kernel", "gate + up: silu_mul in the kernel", "down: residual in the kernel",
    ]  # fmt: skip
    assert not kept
    assert [(s.epilogue, s.x_dtype) for s in specs] == [(("silu_mul",), "bf16"), (("residual",), "bf16")]
    assert torch.allclose(gm(X), want, atol=1e-6)
    assert torch.allclose(gm(X[:1]), want[:1], atol=1e-6)
    dispatch.reset()


def _code(run: object, *args: object) -> str:
    with pytest.raises(LowbitError) as e:
        run(*args)  # type: ignore[operator]
    return e.value.code


def test_what_cannot_be_exported_or_loaded_is_one_clear_error(tmp_path: Path) -> None:
    assert _code(lowbit.export, tiny_llama(num_hidden_layers=1), tmp_path / "out") == "LB0574"
    assert not (tmp_path / "out").exists()
    assert _code(lowbit.load_exported, tmp_path) == "LB0576"
    (tmp_path / PACKAGE).write_bytes(b"")
    assert _code(lowbit.load_exported, tmp_path) == "LB0576"
    (tmp_path / CALL).write_text(json.dumps(describe_call(X, 0, 4)))
    assert _code(lowbit.load_exported, tmp_path) == "LB0482"
    entry = {
        "spec": "{}", "backend": "cpp", "target": "sm_90", "schedule": {}, "tokens": [1], "file": "a" * 40 + ".so",
        "sha256": "0" * 64, "source": "s", "toolchain": "t", "error": None,
    }  # fmt: skip
    (tmp_path / "kernels").mkdir()
    head = {"schema": 1, "frozen": False, "max_tokens": 1, "dtype": "f32"}
    (tmp_path / MANIFEST).write_text(json.dumps({**head, "kernels": [entry]}))
    assert _code(lowbit.load_exported, tmp_path) == "LB0480"
    shutil.rmtree(tmp_path / "kernels")
    dispatch.reset()


class _Loaded(AssertionError):
    """The package was called."""


def test_a_package_is_only_called_with_what_it_was_made_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        raise _Loaded

    (tmp_path / PACKAGE).write_bytes(b"")
    (tmp_path / CALL).write_text(json.dumps(describe_call(torch.arange(8)[None], 1, 16)))
    monkeypatch.setattr("lowbit.compiler.runtime.package.read_kernels", lambda folder: SimpleNamespace(kernels=[1]))
    monkeypatch.setattr("lowbit.compiler.runtime.package._check", lambda kernels: None)
    monkeypatch.setattr("lowbit.compiler.runtime.package.prebuilt.use_kernels", lambda *given, **options: None)
    monkeypatch.setattr("torch._inductor.aoti_load_package", lambda path: run)
    call = lowbit.load_exported(tmp_path, frozen=False)
    for tokens in (1, 16):
        with pytest.raises(_Loaded):
            call(torch.zeros(1, tokens, dtype=torch.int64))
    wrong = [torch.zeros(2, 8).long(), torch.zeros(1, 17).long(), torch.zeros(1, 0).long(), torch.zeros(8).long()]
    for x in (*wrong, torch.zeros(1, 8).int(), torch.zeros(1, 8)):  # compiled code would read memory as if they fitted
        assert _code(call, x) == "LB0580"


LOAD = """
import sys, torch, lowbit
run, (x, want) = lowbit.load_exported(sys.argv[1]), torch.load(sys.argv[2])
axis = 1 if len(x) == 1 else 0  # token ids [1, tokens] or activations [tokens, features]
for n in range(1, x.shape[axis] + 1):
    assert torch.allclose(run(x.narrow(axis, 0, n)), want.narrow(axis, 0, n), atol=1e-4), n
assert not {"transformers", "lowbit.compiler.frontend.dynamo"} & set(sys.modules)
print("equal")
"""


def _elsewhere(folder: Path, package: Path, *call: torch.Tensor) -> subprocess.CompletedProcess[str]:
    """LOAD in a process that finds no compiler and no kernel but the package's."""
    torch.save(call, folder / "call.pt")
    hidden = {**os.environ, "PATH": "", "CXX": "", "LOWBIT_CACHE": str(folder / "empty")}
    command = [sys.executable, "-c", LOAD, str(package), str(folder / "call.pt")]
    return subprocess.run(command, env=hidden, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
def test_a_package_runs_elsewhere_without_a_compiler(tmp_path: Path) -> None:
    model, package = _block(), tmp_path / "package"
    report = lowbit.export(model, package, X, max_tokens=4)
    assert report.kernels == len(list((package / "kernels").glob("*.so"))) > 0
    done = _elsewhere(tmp_path, package, X, model(X))
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
    assert not (tmp_path / "empty").exists()
    next((package / "kernels").glob("*.so")).unlink()
    assert "LB0480" in _elsewhere(tmp_path, package, X, model(X)).stderr


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
def test_a_whole_language_model_runs_elsewhere(tmp_path: Path) -> None:
    model = swap_linears(tiny_llama(), "int4.g32.sym").eval()
    ids = torch.arange(9)[None]
    report = lowbit.export(model, tmp_path / "package", max_tokens=16)
    assert any("one kernel" in line for line in report.fused)
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
    done = _elsewhere(tmp_path, tmp_path / "package", ids, want)
    assert done.stdout.strip() == "equal", done.stderr[-2000:]
