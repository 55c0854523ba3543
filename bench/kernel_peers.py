"""Other people's kernels for the same product, each behind a guard that says why it was left out.

An adapter takes a dense bfloat16 matrix and gives a function x -> y that uses the peer's own 4-bit format, so that
speed is compared on matrices of equal shape and width; values differ by the peer's own rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from kernel_cases import Problem

from lowbit.quantizers.formats import Format

Product = Callable[[torch.Tensor], torch.Tensor]


class Skip(Exception):
    """Why a peer does not take part."""


def _scalar(problem: Problem) -> Format:
    """The format of a matrix with one code per weight, which is all that peers here know."""
    if problem.spec.vector is not None:
        raise Skip("has no vector formats")
    return problem.spec.fmt


def torch_bf16(problem: Problem, dense: torch.Tensor) -> Product:
    """The unquantized layer."""
    weight = dense.to(torch.bfloat16)
    return lambda x: torch.nn.functional.linear(x, weight)


def _uint4(dense: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes int32 [N, K] in 0..15, scales and minima [N, K / group], value = code * scale + minimum."""
    n, k = dense.shape
    grouped = dense.float().view(n, k // group, group)
    low, high = grouped.amin(2), grouped.amax(2)
    scale = ((high - low) / 15).clamp(min=1e-8)
    codes = ((grouped - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int32)
    return codes.view(n, k), scale, low


def tinygemm(problem: Problem, dense: torch.Tensor) -> Product:
    """torch's own int4 product."""
    bits, group = _scalar(problem).bits, problem.spec.group
    if bits != 4 or group not in (32, 64, 128, 256):
        raise Skip("int4 with groups of 32 to 256 only")
    codes, scale, low = _uint4(dense, group)
    packed = torch.ops.aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
    # torch stores value = (code - 8) * scale + zero.
    side = torch.stack([scale, low + 8 * scale], dim=2).transpose(0, 1).contiguous().to(torch.bfloat16)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, side)


def humming(problem: Problem, dense: torch.Tensor) -> Product:
    """humming-kernels, any width up to 8."""
    try:
        from humming import HummingLayer  # type: ignore[import-not-found]
    except ImportError as e:
        raise Skip(f"not importable: {e}") from e
    spec, fmt = problem.spec, _scalar(problem)
    config = {"dtype": f"int{fmt.bits}", "group_size": spec.group if spec.groups > 1 else 0}
    config["has_zero_point"] = fmt.zero
    layer = HummingLayer(shape_n=problem.n, shape_k=problem.k, weight_config=config, torch_dtype=torch.bfloat16).cuda()
    layer.load_from_unquantized(dense.to(torch.bfloat16))
    layer.transform()
    return lambda x: layer(x)


def gemlite(problem: Problem, dense: torch.Tensor) -> Product:
    """gemlite's Triton kernels."""
    try:
        from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]
    except ImportError as e:
        raise Skip(f"not importable: {e}") from e
    if _scalar(problem).bits != 4:
        raise Skip("set up for 4 bits here")
    group = problem.spec.group
    codes, scale, low = _uint4(dense, group)
    layer = GemLiteLinear(
        4, group_size=group, in_features=problem.k, out_features=problem.n,
        input_dtype=DType.BF16, output_dtype=DType.BF16,
    )  # fmt: skip
    layer.pack(codes.to(torch.uint8), scale.bfloat16(), (-low / scale).bfloat16(), None)
    return lambda x: layer(x)


def marlin(problem: Problem, dense: torch.Tensor) -> Product:
    """Marlin as vLLM carries it."""
    try:
        from vllm.model_executor.layers.quantization.utils import (  # type: ignore[import-not-found]
            marlin_utils,
            marlin_utils_test,
        )
        from vllm.scalar_type import scalar_types  # type: ignore[import-not-found]
    except ImportError as e:
        raise Skip(f"not importable: {e}") from e
    spec, fmt = problem.spec, _scalar(problem)
    if fmt.zero or fmt.offset or fmt.bits not in (4, 8):
        raise Skip("symmetric 4 and 8 bits only")
    kind = scalar_types.uint4b8 if fmt.bits == 4 else scalar_types.uint8b128
    group = spec.group if spec.groups > 1 else -1
    _, q, s, g_idx, sort, _ = marlin_utils_test.marlin_quantize(dense.t().contiguous().bfloat16(), kind, group, False)
    workspace = marlin_utils.marlin_make_workspace_new(q.device)
    empty = marlin_utils.marlin_make_empty_g_idx(q.device)
    return lambda x: marlin_utils.apply_gptq_marlin_linear(
        x, q, s, empty, g_idx, sort, workspace, kind, problem.n, problem.k, is_k_full=True
    )


PEERS: dict[str, Callable[[Problem, torch.Tensor], Product]] = {
    "torch-bf16": torch_bf16,
    "torch-int4pack": tinygemm,
    "humming": humming,
    "gemlite": gemlite,
    "marlin": marlin,
}


def prepare(name: str, problem: Problem, dense: torch.Tensor) -> tuple[Product | None, str]:
    """The peer's product, or None and why not. A peer that fails in its own code is left out with its words."""
    try:
        return PEERS[name](problem, dense), ""
    except Skip as e:
        return None, str(e)
    except Exception as e:  # a peer's failure is a finding, not ours to stop for
        return None, f"{type(e).__name__}: {e}"[:300]
