"""Triton's interpreter with lowbit's builder computes bfloat16 and float8 as torch does, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lowbit.codegen.triton.interpret import install
from lowbit.compiler.errors import KernelError

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

SCRIPT = """
import sys
import torch
from lowbit.codegen.triton.interpret import install

install()
import triton
import triton.language as tl


@triton.jit
def elementwise(a_ptr, b_ptr, add_ptr, mul_ptr, exp_ptr, less_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(add_ptr + i, a + b)
    tl.store(mul_ptr + i, a * b)
    tl.store(exp_ptr + i, tl.exp(a.to(tl.float32)).to(tl.bfloat16))
    tl.store(less_ptr + i, (a < b).to(tl.int8))


@triton.jit
def casts(x_ptr, bf16_ptr, e4m3_ptr, wide_ptr, int_ptr, from_int_ptr, half_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    narrow = x.to(tl.bfloat16)
    tl.store(bf16_ptr + i, narrow)
    tl.store(e4m3_ptr + i, x.to(tl.float8e4nv))
    tl.store(wide_ptr + i, narrow.to(tl.float32))
    tl.store(int_ptr + i, narrow.to(tl.int32))
    tl.store(from_int_ptr + i, (i * 37).to(tl.bfloat16))
    tl.store(half_ptr + i, narrow.to(tl.float16))


@triton.jit
def dot(a_ptr, b_ptr, c_ptr, steps, N: tl.constexpr):
    i = tl.arange(0, N)
    acc = tl.zeros((N, N), tl.float32)
    for k in range(0, steps):
        a = tl.load(a_ptr + i[:, None] * N * 2 + k * N + i[None, :])
        b = tl.load(b_ptr + (k * N + i[:, None]) * N + i[None, :])
        acc = tl.dot(a, b, acc, out_dtype=tl.float32)
    tl.store(c_ptr + i[:, None] * N + i[None, :], acc)


d = torch.load(sys.argv[1], weights_only=True)
n = d["a"].numel()
out = {name: torch.empty(n, dtype=torch.bfloat16) for name in ("add", "mul", "exp", "bf16", "from_int")}
out |= {"less": torch.empty(n, dtype=torch.int8), "e4m3": torch.empty(n, dtype=torch.float8_e4m3fn)}
out |= {"wide": torch.empty(n), "int": torch.empty(n, dtype=torch.int32), "half": torch.empty(n, dtype=torch.float16)}
elementwise[(1,)](d["a"], d["b"], out["add"], out["mul"], out["exp"], out["less"], N=n)
casts[(1,)](d["x"], out["bf16"], out["e4m3"], out["wide"], out["int"], out["from_int"], out["half"], N=n)
out["dot"] = torch.empty(16, 16)
dot[(1,)](d["left"], d["right"], out["dot"], 2, N=16)
torch.save(out, sys.argv[2])
"""


@pytest.fixture(scope="module")
def data() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    special = [0.0, -0.0, 1e-3, 448.0, 500.0, 1e6, -7.95, 1.00390625, 1.01171875, 3.4e38, 2.0**-133, 0.0009765625]
    x = torch.cat([torch.tensor(special), torch.randn(500, generator=rng) * 50])
    return {
        "a": torch.randn(512, generator=rng).bfloat16(),
        "b": torch.randn(512, generator=rng).bfloat16(),
        "x": x,
        # Small integers: exact sums, so that the order of additions does not matter.
        "left": torch.randint(-8, 8, (16, 32), generator=rng).bfloat16(),
        "right": torch.randint(-8, 8, (32, 16), generator=rng).bfloat16(),
    }


@pytest.fixture(scope="module")
def results(data: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder: Path = tmp_path_factory.mktemp("shim")
    (folder / "script.py").write_text(SCRIPT)
    torch.save(data, folder / "in.pt")
    env = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, str(folder / "script.py"), str(folder / "in.pt"), str(folder / "out.pt")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded: dict[str, torch.Tensor] = torch.load(folder / "out.pt", weights_only=True)
    return loaded


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_bf16_arithmetic(data: dict[str, torch.Tensor], results: dict[str, torch.Tensor]) -> None:
    assert same_bits(results["add"], data["a"] + data["b"])
    assert same_bits(results["mul"], data["a"] * data["b"])
    assert torch.equal(results["less"].bool(), data["a"] < data["b"])
    torch.testing.assert_close(results["exp"].float(), data["a"].float().exp(), rtol=2**-8, atol=0)


def test_float32_to_bf16_rounds_to_nearest_even(
    data: dict[str, torch.Tensor], results: dict[str, torch.Tensor]
) -> None:
    assert same_bits(results["bf16"], data["x"].bfloat16())
    ties = torch.tensor([1.00390625, 1.01171875]).bfloat16()  # halfway: the first rounds down, the second up
    assert torch.equal(results["bf16"][7:9], ties)
    assert ties.tolist() == [1.0, 1.015625]


def test_e4m3_saturates(data: dict[str, torch.Tensor], results: dict[str, torch.Tensor]) -> None:
    assert same_bits(results["e4m3"], data["x"].clamp(-448, 448).to(torch.float8_e4m3fn))
    assert results["e4m3"].float()[3:7].tolist() == [448.0, 448.0, 448.0, -8.0]


def test_bf16_to_other_types(data: dict[str, torch.Tensor], results: dict[str, torch.Tensor]) -> None:
    narrow = data["x"].bfloat16()
    finite = narrow.float().abs() < 1e9
    assert same_bits(results["wide"], narrow.float())
    assert torch.equal(results["int"][finite], narrow.to(torch.int32)[finite])
    assert same_bits(results["half"][finite], narrow.to(torch.float16)[finite])
    assert same_bits(results["from_int"], (torch.arange(512) * 37).bfloat16())


def test_bf16_dot(data: dict[str, torch.Tensor], results: dict[str, torch.Tensor]) -> None:
    assert torch.equal(results["dot"], data["left"].float() @ data["right"].float())


def test_install_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(KernelError, match="LB0449"):
        install()
