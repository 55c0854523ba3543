"""The operator without Python: the same bits, whatever is rare goes to Python, and nothing stale is ever called."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from _models import random_qtensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit.codegen.cpp.backend import CppBackend
from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.codegen.cpp.torch_op import OperatorSpec, load_operator, operator_problem, operator_source
from lowbit.codegen.select import say_once
from lowbit.compiler.errors import KernelError, RunError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.runtime import dispatch, native_op, ops
from lowbit.compiler.runtime.modules import PackedLinear, QuantLinear
from lowbit.quantizers.qtensor import pack

NATIVE, PYTHON = torch.ops.lowbit.linear.default, torch.ops.lowbit.linear_python.default

pytestmark = [
    pytest.mark.real_kernels,
    pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(operator_problem() is not None, reason="needs torch's C++ headers"),
]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    dispatch.reset()
    yield
    dispatch.reset()


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the inputs that arrived in Python since."""
    seen: list[tuple[int, ...]] = []
    original: Callable[..., torch.Tensor] = ops.run_packed

    def watched(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return original(x, *rest)

    monkeypatch.setattr(ops, "run_packed", watched)
    return seen


def inner_of(fmt: str, epilogue: tuple[str, ...] = (), n: int = 24, k: int = 64, seed: int = 0) -> PackedLinear:
    return PackedLinear(pack([random_qtensor(fmt, n, k, seed)], LAYOUTS["panel16"]), "float", epilogue)


def layer_of(seed: int = 0) -> QuantLinear:
    return QuantLinear.from_qtensor(random_qtensor("int4.g32.sym", 24, 64, seed), compute="float")


def oracle(layer: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    return x @ layer.qtensor().dequantize().T


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).norm() < 1e-4 * want.norm())


@torch.no_grad()
@pytest.mark.parametrize(
    ("fmt", "dtype", "epilogue"),
    [
        ("int4.g32.sym", torch.float32, ()),
        ("int3.g48.asym", torch.bfloat16, ("bias",)),
        ("e3m2.ch", torch.float16, ("bias", "residual")),
    ],
)
def test_bits_are_pythons(
    fmt: str, dtype: torch.dtype, epilogue: tuple[str, ...], in_python: list[tuple[int, ...]]
) -> None:
    inner = inner_of(fmt, epilogue)
    for shape in ((1, 64), (64,), (2, 1, 64), (2, 2, 64)):
        x = torch.randn(shape).to(dtype)
        bias = torch.randn(24).to(dtype) if "bias" in epilogue else None
        residual = torch.randn(*shape[:-1], 24).to(dtype) if "residual" in epilogue else None
        args = (x, inner.operands(), bias, residual, inner.key)
        want = PYTHON(*args)
        in_python.clear()
        for got in (NATIVE(*args), inner(x, bias, residual)):
            assert torch.equal(got, want)
            assert (got.shape, got.dtype, got.is_contiguous()) == ((*shape[:-1], 24), dtype, True)
        assert not in_python


@torch.no_grad()
def test_what_is_not_plain_goes_to_python(in_python: list[tuple[int, ...]]) -> None:
    inner = inner_of("e3m2.ch", ("bias", "residual"))
    weight, x, residual = inner.operands(), torch.randn(4, 64).half(), torch.randn(4, 24).half()
    bias = torch.randn(24)
    want = NATIVE(x, weight, bias, residual, inner.key)
    in_python.clear()
    for inputs, added in [
        (x.T.contiguous().T, residual),
        (x, residual.T.contiguous().T),
        (x, residual.double()),
    ]:
        assert torch.equal(NATIVE(inputs, weight, bias, added, inner.key), want)
    assert NATIVE(x[:0], weight, bias, residual[:0], inner.key).shape == (0, 24)
    assert len(in_python) == 4
    assert NATIVE(x.to("meta"), weight, bias, residual.to("meta"), inner.key).shape == (4, 24)
    with pytest.raises(KernelError, match=r"LB0417.*64"):
        NATIVE(x[:, :63].contiguous(), weight, bias, residual, inner.key)
    with pytest.raises(KernelError, match=r"LB0417.*64"):
        NATIVE(torch.tensor(1.0), weight, bias, residual, inner.key)
    with pytest.raises(KernelError, match="LB0401"):
        NATIVE(x.double(), weight, bias, residual, inner.key)
    for missing in ((None, residual), (bias, None)):
        with pytest.raises(KernelError, match=r"LB0415.*bias and residual"):
            NATIVE(x, weight, *missing, inner.key)
    with pytest.raises(ValueError, match="shorter"):
        NATIVE(x, weight[:1], bias, residual, inner.key)


@torch.no_grad()
def test_kernels_that_are_forgotten_are_chosen_anew(in_python: list[tuple[int, ...]]) -> None:
    one, other = inner_of("int4.g32.sym"), inner_of("int4.g32.sym", seed=1, n=40)
    x = torch.randn(1, 64)
    want = one(x), other(x)
    key = dispatch.kernel_for(one.key, x.dtype, x.device, 1).spec.key()
    in_python.clear()
    dispatch.forget([key])
    assert torch.equal(other(x), want[1])
    assert not in_python
    assert torch.equal(one(x), want[0])
    assert torch.equal(one(x), want[0])
    assert len(in_python) == 1
    dispatch.reset()
    for _ in range(2):
        assert torch.equal(one(x), want[0])
        assert torch.equal(other(x), want[1])
    assert len(in_python) == 3


@torch.no_grad()
def test_weights_that_are_replaced_or_freed_leave_nothing_behind() -> None:
    x = torch.randn(1, 64)
    for seed in range(20):  # the next layer's tensors get the memory, and the identity, of the last one's
        layer = layer_of(seed)
        assert close(layer(x), oracle(layer, x))
        del layer
    layer, other = layer_of(), layer_of(1)
    assert layer.inner is not None
    assert other.inner is not None
    for name, tensor in other.inner.named_buffers():
        layer.inner.get_buffer(name).data = tensor.clone()
    assert torch.equal(layer(x), other(x))


@torch.no_grad()
def test_threads_call_while_kernels_are_forgotten() -> None:
    layers, xs = [layer_of(seed) for seed in range(4)], [torch.randn(m, 64) for m in (1, 3, 1, 2)]
    want = [layer(x) for layer, x in zip(layers, xs, strict=True)]

    def calls(i: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(layers[i](xs[i]), want[i]) for _ in range(100))

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(calls, i) for i in range(4)]
        for _ in range(5):
            dispatch.reset()
        assert all(job.result() for job in jobs)


@torch.no_grad()
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_calls_on() -> None:
    layer, x = layer_of(), torch.randn(1, 64)
    want = layer(x)
    if (child := os.fork()) == 0:
        os._exit(0 if torch.equal(layer(x), want) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_torch_sees_the_operator_as_before(in_python: list[tuple[int, ...]]) -> None:
    layer, x = layer_of(), torch.randn(1, 64)
    want = layer(x)
    in_python.clear()
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), want)
    program = torch.export.export(layer, (x,))
    assert "torch.ops.lowbit.linear.default" in program.graph_module.code
    assert torch.equal(program.module()(x), want)
    with torch.profiler.profile() as profile:
        layer(x)
    assert "lowbit::linear" in [event.key for event in profile.key_averages()]
    with torch.inference_mode():
        assert layer(x).is_inference()
    assert not in_python


class _Notes:
    """Notes what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def note(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class _Ops(_Notes, TorchDispatchMode):
    __torch_dispatch__ = _Notes.note


class _Functions(_Notes, TorchFunctionMode):
    __torch_function__ = _Notes.note


class _Named(torch.Tensor):
    pass


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*jit.trace:DeprecationWarning")
def test_calls_past_the_dispatcher_are_those_nobody_wants_to_see() -> None:
    inner = inner_of("e3m2.ch", ("bias", "residual"))
    x, bias, residual = torch.randn(2, 64).half(), torch.randn(24), torch.randn(2, 24).half()
    weight, key = inner.operands(), inner.key
    want = NATIVE(x, weight, bias, residual, key)
    direct = native_op.direct
    assert direct is not None

    def declined(*args: Any) -> bool:
        return direct(*args) is NotImplemented

    call = (x, weight, bias, residual, key)
    assert torch.equal(direct(*call), want)
    assert torch.equal(direct(torch.nn.Parameter(x), weight, torch.nn.Parameter(bias), residual, key), want)
    with torch.inference_mode():
        assert direct(*call).is_inference()
    for mode in (_Ops(), _Functions()):
        with mode:
            assert declined(*call)
            assert torch.equal(inner(x, bias, residual), want)
        assert any("lowbit.linear" in name for name in mode.seen)
    with torch.profiler.profile():
        assert declined(*call)
    with torch.enable_grad():
        assert torch.equal(direct(*call), want)
        assert declined(x.clone().requires_grad_(), *call[1:])
        assert declined(x, weight, torch.nn.Parameter(bias), residual, key)
    with FakeTensorMode() as fakes:
        assert declined(fakes.from_tensor(x), *call[1:])
    watched: list[bool] = []
    torch.vmap(lambda row: (watched.append(declined(row, *call[1:])), row)[1])(x)
    torch.jit.trace(lambda row: (watched.append(declined(row, *call[1:])), row + 1)[1], (x,), check_trace=False)
    assert watched == [True, True]
    rest = call[1:]
    for other in (x.as_subclass(_Named), x.to("meta"), x.to_sparse(), x.T, x[:0], x.double(), x[:, :63], None, "x"):
        assert declined(other, *rest)
    assert declined(*call[:4])
    assert declined(x, tuple(weight), *call[2:])
    assert declined(x, [*weight] * 9, *call[2:])
    assert declined(x, [w.to("meta") for w in weight], *call[2:])
    assert declined(*call[:4], key + " ")
    assert declined(*call[:4], "\ud800")
    assert declined(*call[:4], 1)


@pytest.mark.slow
def test_without_pythons_headers_there_is_only_the_operator(tmp_path: Path) -> None:
    source = operator_source(OperatorSpec(python=""))
    assert "Python.h" not in source.text
    assert "-ltorch_python" not in source.flags
    CppBackend().compile(source, tmp_path / "operator.so")
    assert load_operator(tmp_path / "operator.so").direct is None


@pytest.mark.filterwarnings("ignore:lowbit..linear. an autograd kernel was not registered")
def test_gradients_are_refused_as_before() -> None:
    layer, x = layer_of(), torch.randn(1, 64, requires_grad=True)
    for _ in range(2):
        with pytest.raises(RunError, match="LB0571"):
            layer(x).sum().backward()
    inner, bias = inner_of("int3.g48.asym", ("bias",)), torch.nn.Parameter(torch.randn(24))
    assert not any(inner(x.detach().bfloat16(), bias).requires_grad for _ in range(2))


@torch.no_grad()
def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, in_python: list[tuple[int, ...]]) -> None:
    inner, x = inner_of("int4.g32.sym"), torch.randn(1, 64)
    want = inner(x)
    assert native_op.installed
    monkeypatch.setenv("LOWBIT_NATIVE_OPERATOR", "0")
    dispatch.reset()
    assert "LOWBIT_NATIVE_OPERATOR" in (native_op.missing() or "")
    in_python.clear()
    assert all(torch.equal(inner(x), want) for _ in range(3))
    assert len(in_python) == 3


@torch.no_grad()
def test_an_operator_that_cannot_be_built_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails() -> None:
        raise KernelError("LB0410", "the C++ compiler failed: no such header")

    monkeypatch.setattr(native_op, "_operator", None)
    monkeypatch.setattr(native_op, "_problem", None)
    monkeypatch.setattr(native_op, "_artifact", fails)
    say_once.cache_clear()
    layer, x = layer_of(), torch.randn(1, 64)
    with caplog.at_level(logging.WARNING, "lowbit"):
        assert close(layer(x), oracle(layer, x))
        layer(torch.randn(2, 64))
    said = [record.message for record in caplog.records if "go through Python" in record.message]
    assert len(said) == 1
    assert "no such header" in said[0]
    assert native_op.missing() == "the C++ compiler failed: no such header"


@torch.no_grad()
def test_taking_pythons_place_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    layer_of()(torch.randn(1, 64))
    assert native_op._operator is not None
    native_op._operator.install()
    assert capfd.readouterr().err == ""


def test_classes_cover_every_number_of_tokens_once() -> None:
    classes = dispatch.classes_up_to(10**6)
    ranges = [native_op.tokens_of(m, False) for m in classes]
    assert ranges[0][0] == 1
    assert all(last + 1 == first for (_, last), (first, _) in pairwise(ranges))
    assert ranges[-1][1] > 2**60
    assert all(dispatch.token_class(m) == c for c, r in zip(classes, ranges, strict=True) for m in (r[0], min(r[1], c)))
