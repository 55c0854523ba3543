"""llama.cpp's matrix products, driven as a C program would: a ggml graph of one `mul_mat` on its CPU backend.

The libraries are those of the PyPI package llama-cpp-python. It may live in an environment of its own, because nothing
of it is imported: `LOWBIT_GGML` names the folder with libggml-base.so and libggml-cpu.so. Built for the machine at hand
(`CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python`), as llama.cpp itself is.

`LOWBIT_IK_GGML` likewise names the folder of the fork ik_llama.cpp's libggml.so (cmake target `ggml`, with
`-DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON`): an older ggml with kernels and types of its own, those ending in `_r4` or
`_r8` stored interleaved for this kind of machine.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

TYPES = {"q4_0": 2, "q5_0": 6, "q8_0": 8, "q2_K": 10, "q3_K": 11, "q4_K": 12, "q5_K": 13, "q6_K": 14, "iq2_xxs": 16,
         "iq4_nl": 20, "iq4_xs": 23, "tq2_0": 35, "mxfp4": 39}  # fmt: skip
"""`enum ggml_type`; checked against the library's own names."""
BITS = {"q4_0": 4, "q5_0": 5, "q8_0": 8, "q2_K": 2, "q3_K": 3, "q4_K": 4, "q5_K": 5, "q6_K": 6, "iq2_xxs": 2,
        "iq4_nl": 4, "iq4_xs": 4, "tq2_0": 2, "mxfp4": 4}  # fmt: skip
"""Bits of a code, without its share of scales."""
IK_TYPES = {"q4_0_r8": 202, "q8_0_r8": 208, "q2_k_r4": 210, "q4_k_r4": 212, "q6_k_r4": 214, "iq4_ks": 144, "iq4_k": 139,
            "iq3_k": 138, "iq2_k": 137, "iq2_kt": 153, "iq3_kt": 154, "iq4_kt": 155}  # fmt: skip
"""Likewise of ik_llama.cpp."""
BITS |= {"q4_0_r8": 4, "q8_0_r8": 8, "q2_k_r4": 2, "q4_k_r4": 4, "q6_k_r4": 6, "iq4_ks": 4, "iq4_k": 4, "iq3_k": 3,
         "iq2_k": 2, "iq2_kt": 2, "iq3_kt": 3, "iq4_kt": 4}  # fmt: skip
_TERNARY = frozenset({"tq2_0"})

SAMPLE_ROWS = 256  # rows that are quantized; the others repeat them, because quantizing K types takes seconds
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_type_name": (c_char_p, [c_int]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_quantize_requires_imatrix": (c_bool, [c_int]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_graph_overhead": (c_size_t, []),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_version": (c_char_p, []),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_buft_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
}


_BUFFER_AT = 8  # `buffer` in `struct ggml_tensor`, after `type` and padding


class _Params(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


def find_libraries() -> Path | None:
    """The folder of ggml's shared objects, or None."""
    if given := os.environ.get("LOWBIT_GGML"):
        folder = Path(given)
    else:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            return None
        folder = Path(spec.origin).parent / "lib"
    return folder if (folder / "libggml-cpu.so").exists() else None


def find_ik_libraries() -> Path | None:
    """The folder of ik_llama.cpp's libggml.so, or None."""
    given = os.environ.get("LOWBIT_IK_GGML")
    return Path(given) if given and (Path(given) / "libggml.so").exists() else None


class Ggml:
    """The loaded libraries, and one CPU backend. What is allocated lives as long as the process.

    fork: they are ik_llama.cpp's. Both can be loaded at once: the fork sees its own symbols first.
    """

    def __init__(self, folder: Path, fork: bool = False) -> None:
        self.name, self.types = ("ik", IK_TYPES) if fork else ("ggml", TYPES)
        if fork:
            base = cpu = ctypes.CDLL(str(folder / "libggml.so"), mode=os.RTLD_LOCAL | os.RTLD_DEEPBIND)
        else:
            base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
            cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        self._functions: dict[str, Any] = {}
        for name, (result, arguments) in _SIGNATURES.items():
            if fork and not hasattr(base, name):
                continue
            function = getattr(base if hasattr(base, name) else cpu, name)
            function.restype, function.argtypes = result, arguments
            self._functions[name] = function
        self._init = base.ggml_init
        self._init.restype, self._init.argtypes = c_void_p, [_Params]
        for name, number in self.types.items():
            found = self("ggml_type_name", number).decode()
            assert found == name, f"ggml type {number} is {found}, not {name}: another version of ggml"
        self._backend = self("ggml_backend_cpu_init")

    def __call__(self, name: str, *args: Any) -> Any:
        return self._functions[name](*args)

    @property
    def version(self) -> str:
        """ggml's own, where it has one."""
        return str(self("ggml_version").decode()) if "ggml_version" in self._functions else "without a version"

    def set_threads(self, threads: int) -> None:
        """For all calls that follow."""
        self("ggml_backend_cpu_set_n_threads", self._backend, threads)

    @cached_property
    def buffer_types(self) -> dict[str, int]:
        """Where weights can live: `CPU` as they are, and `CPU_REPACK`, which rearranges them for this machine."""
        if "ggml_backend_cpu_reg" not in self._functions:
            return {"CPU": self("ggml_backend_cpu_buffer_type")}
        registry = self("ggml_backend_cpu_reg")
        address = self("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        found = [self("ggml_backend_cpu_buffer_type")]
        if address:
            extra = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)
            listed = extra(self("ggml_backend_reg_dev_get", registry, 0))
            at = 0
            while listed[at]:
                found.append(listed[at])
                at += 1
        return {self("ggml_backend_buft_name", buft).decode(): buft for buft in found}

    def row_bytes(self, kind: str, k: int) -> int:
        """Bytes of one row of `k` weights."""
        return int(self("ggml_row_size", self.types[kind], k))

    def quantize(self, kind: str, weight: torch.Tensor) -> torch.Tensor:
        """uint8: contiguous float32 [rows, k] in type `kind`; all weights count alike."""
        rows, k = weight.shape
        packed, important = torch.empty(rows * self.row_bytes(kind, k), dtype=torch.uint8), torch.ones(k)
        given = important.data_ptr() if self("ggml_quantize_requires_imatrix", self.types[kind]) else None
        written = self("ggml_quantize_chunk", self.types[kind], weight.data_ptr(), packed.data_ptr(), 0, rows, k, given)
        assert written == packed.numel()
        return packed

    def products(self, kind: str, buffer_type: str, x: torch.Tensor, n: int, copies: int) -> list[Product]:
        """Calls that multiply x, float32 [M, K], with one copy each of random weights [n, K] of type `kind`, n a
        multiple of SAMPLE_ROWS. The first has run, and its result was compared."""
        k = x.shape[1]
        sample = torch.randn(SAMPLE_ROWS, k, generator=torch.Generator().manual_seed(1))
        if kind in _TERNARY:
            sample = sample.round().clamp(-1, 1)
        data = self.quantize(kind, sample).repeat(n // SAMPLE_ROWS)
        calls = self._products(kind, buffer_type, data, x, n, copies)
        calls[0]()
        exact = (x @ sample.T).repeat(1, n // SAMPLE_ROWS)
        error = float((calls[0].result() - exact).norm() / exact.norm())
        assert error < 0.4, f"ggml's {kind} product is off by {error:.0%}"
        return calls

    def supports(self, kind: str, buffer_type: str, n: int, k: int) -> bool:
        """Whether weights [n, k] of type `kind` can be multiplied from this buffer type: llama.cpp's own question."""
        if buffer_type == "CPU":
            return True
        context = self._context(8)
        weight = self("ggml_new_tensor_2d", context, self.types[kind], k, n)
        out = self("ggml_mul_mat", context, weight, self("ggml_new_tensor_2d", context, 0, k, 1))
        empty = self("ggml_backend_buft_alloc_buffer", self.buffer_types[buffer_type], 0)
        c_void_p.from_address(weight + _BUFFER_AT).value = empty
        device = self("ggml_backend_reg_dev_get", self("ggml_backend_cpu_reg"), 0)
        return bool(self("ggml_backend_dev_supports_op", device, out))

    def _context(self, tensors: int, graphs: int = 1) -> int:
        """A context for graphs and tensors, whose data a backend allocates. A process can have 64 of them."""
        room = tensors * self("ggml_tensor_overhead") + graphs * self("ggml_graph_overhead")
        return int(self._init(_Params(room, None, True)))

    def _products(
        self, kind: str, buffer_type: str, data: torch.Tensor, x: torch.Tensor, n: int, copies: int
    ) -> list[Product]:
        m, k = x.shape
        holder, context = self._context(copies + 1), self._context(8 * copies, copies)
        weights = [self("ggml_new_tensor_2d", holder, self.types[kind], k, n) for _ in range(copies)]
        self("ggml_backend_alloc_ctx_tensors_from_buft", holder, self.buffer_types[buffer_type])
        found, inputs = [], []
        for weight in weights:
            self("ggml_backend_tensor_set", weight, data.data_ptr(), 0, data.numel())
            inputs.append(self("ggml_new_tensor_2d", context, 0, k, m))
            out = self("ggml_mul_mat", context, weight, inputs[-1])
            graph = self("ggml_new_graph", context)
            self("ggml_build_forward_expand", graph, out)
            found.append(Product(self, self._backend, graph, out, (m, n)))
        self("ggml_backend_alloc_ctx_tensors_from_buft", context, self.buffer_types["CPU"])
        for given in inputs:
            self("ggml_backend_tensor_set", given, x.data_ptr(), 0, x.numel() * 4)
        return found


class Product:
    """One graph, ready to run."""

    def __init__(self, ggml: Ggml, backend: int, graph: int, out: int, shape: tuple[int, int]) -> None:
        self._ggml, self._graph, self._out, self._shape = ggml, graph, out, shape
        self._run = ggml._functions["ggml_backend_graph_compute"]
        self._backend = backend

    def __call__(self) -> None:
        status = self._run(self._backend, self._graph)
        assert status == 0, f"ggml failed with status {status}"

    def result(self) -> torch.Tensor:
        """float32 [M, n] of the last call."""
        y = torch.empty(self._shape)
        self._ggml("ggml_backend_tensor_get", self._out, y.data_ptr(), 0, y.numel() * 4)
        return y
