"""onnxruntime's `MatMulNBits`, the kernel behind its quantized language models, with int8 activations.

onnxruntime and onnx may live in an environment of their own with the same Python: `LOWBIT_ORT` names its folder of
packages (`site-packages`), which is looked at after everything else.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["BITS", "GROUP", "find_onnxruntime", "products", "share_threads", "weight_bytes"]

BITS = (8, 4, 2)
GROUP = 128
_ACCURACY = 4  # activations rounded to int8, as llama.cpp's and ours are


def find_onnxruntime() -> Any:
    """The module, or None where onnxruntime or onnx is missing."""
    if (folder := os.environ.get("LOWBIT_ORT")) and folder not in sys.path:
        sys.path.append(folder)
    if any(importlib.util.find_spec(name) is None for name in ("onnxruntime", "onnx")):
        return None
    import onnxruntime

    return onnxruntime


def weight_bytes(bits: int, n: int, k: int) -> int:
    """Size of a matrix with its scales."""
    return n * k * bits // 8 + n * k // GROUP * 4


def _model(bits: int, n: int, k: int, seed: int) -> tuple[bytes, torch.Tensor]:
    """A model of one product of any number of tokens with random weights, and these weights, float32 [n, k]."""
    from onnx import TensorProto, helper, numpy_helper

    rng = torch.Generator().manual_seed(seed)
    groups, per = k // GROUP, 8 // bits
    codes = torch.randint(0, 2**bits, (n, groups, GROUP), generator=rng, dtype=torch.uint8)
    scales = torch.rand(n, groups, generator=rng) / 2**bits
    parts = codes.view(n, groups, GROUP // per, per).to(torch.int32)
    packed = (parts << (bits * torch.arange(per))).sum(-1).to(torch.uint8)
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft",
        K=k, N=n, bits=bits, block_size=GROUP, accuracy_level=_ACCURACY,
    )  # fmt: skip
    initializers = [
        numpy_helper.from_array(packed.numpy(), "codes"),
        numpy_helper.from_array(scales.reshape(-1).numpy(), "scales"),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", size]) for name, size in (("x", k), ("y", n))
    ]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], initializers)
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=domains, ir_version=9)
    weights = (codes.float() - 2 ** (bits - 1)) * scales[..., None]
    return model.SerializeToString(), weights.reshape(n, k)


def share_threads(ort: Any, threads: int) -> None:
    """Make the threads that sessions of several threads share, as layers of one model do: threads of their own would
    sleep while the other copies have their turns. A process does it once, and makes no sessions of one thread then."""
    ort.set_global_thread_pool_sizes(threads, 1)


def products(ort: Any, bits: int, n: int, k: int, copies: int, shared: bool) -> list[Callable[[torch.Tensor], object]]:
    """Functions that multiply x, float32 [M, K], with one copy each of random weights [n, K], on the shared threads or
    on one. One has run, and its result was compared. Raises RuntimeError where this version has no such kernel."""
    model, weights = _model(bits, n, k, 1)
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    if shared:
        settings.use_per_session_threads = False
    else:
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    x = torch.randn(2, k, generator=torch.Generator().manual_seed(0))
    try:
        sessions = [ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"]) for _ in range(copies)]
        got = torch.from_numpy(sessions[0].run(None, {"x": x.numpy()})[0])
    except Exception as e:  # onnxruntime's own classes, which differ from version to version
        raise RuntimeError(f"onnxruntime has no {bits}-bit product: {str(e).splitlines()[0]}") from e
    exact = x @ weights.T
    error = float((got - exact).norm() / exact.norm())
    assert error < 0.05, f"onnxruntime's {bits}-bit product is off by {error:.0%}"
    return [lambda x, session=session: session.run(None, {"x": x.numpy()}) for session in sessions]  # type: ignore[misc]
