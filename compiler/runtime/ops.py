"""The torch operator behind every quantized layer: `torch.ops.lowbit.linear`.

One op with plain tensors and the kernel's spec as text, so that torch.compile, torch.export and CUDA graphs see a
single opaque call. The raw Library API is used because a call costs less than that of `torch.library.custom_op`. On
CPUs C++ takes the place of what is here once there is a kernel to call (`native_op`). Until then, and on GPUs, layers
do without the operator where nobody would see the call (`unwatched`).
"""

from __future__ import annotations

import json
from functools import cache

import torch
from torch._C._dynamo import eval_frame

from lowbit.codegen.rounded import ROUNDED, RoundedRows
from lowbit.compiler.errors import KernelError
from lowbit.compiler.runtime.dispatch import DTYPE_NAMES, kernel_for, parse_spec
from lowbit.quantizers.formats import parse_activation
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["LIBRARY", "output_features", "run_linear", "run_packed", "unwatched"]

_TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

LIBRARY = torch.library.Library("lowbit", "DEF")
_SCHEMA = "(Tensor x, Tensor[] weight, Tensor? bias, Tensor? residual, str spec) -> Tensor"
LIBRARY.define(f"linear{_SCHEMA}", tags=(torch.Tag.pt2_compliant_tag,))
LIBRARY.define(f"linear_python{_SCHEMA}")  # the same, for C++ to call: see `native_op`


def _linear(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    spec: str,
) -> torch.Tensor:
    return run_packed(x, _packed(weight, spec), bias, residual, spec)


def _packed(weight: list[torch.Tensor], spec: str) -> PackedWeight:
    s = parse_spec(spec)
    return PackedWeight(s.weight_format, s.layout_, s.segments, s.k, dict(zip(s.operands, weight, strict=True)))


def unwatched(x: torch.Tensor) -> bool:
    """Whether a call of the operator with `x` would run its kernel and nothing else: no mode, transform, gradient,
    trace or profiler takes part. Not to be asked while torch.compile traces."""
    return (
        type(x) is torch.Tensor
        and (x.is_cpu or x.is_cuda)
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.maybe_current_level() is None
        and not torch._C._autograd._profiler_enabled()
        and not torch._C._is_tracing()
    )


def run_packed(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, residual: torch.Tensor | None, spec: str
) -> torch.Tensor:
    """What the operator computes: x [..., K] -> [..., N], with the kernel of `spec`."""
    s = parse_spec(spec)
    if s.uses_rows:
        return _run_rows(x, packed, bias, residual, spec)
    n, k = s.n_out, s.k
    flat = x if x.dim() == 2 and x.shape[1] == k else _rows(x, k)
    out = x.new_empty((flat.shape[0], n))
    if residual is not None:
        residual = residual.reshape(-1, n).to(x.dtype).contiguous()
    _run(flat if flat.is_contiguous() else flat.contiguous(), packed, bias, residual, spec, out)
    return out if flat is x else out.view(*x.shape[:-1], n)


def _run_rows(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, residual: torch.Tensor | None, spec: str
) -> torch.Tensor:
    """The same where x, the output or both are rows of bytes (`codegen.rounded`)."""
    s, flat = parse_spec(spec), _rows(x, parse_spec(spec).x_width).contiguous()
    numbers = _TORCH_DTYPES[s.out_dtype] if s.reads_rows else x.dtype
    out = x.new_empty((flat.shape[0], s.out_width), dtype=torch.uint8 if s.out_activation else numbers)
    if residual is not None:
        residual = residual.reshape(-1, s.n_out).to(numbers).contiguous()
    _run(flat, packed, bias, residual, spec, out)
    return out.view(*x.shape[:-1], s.out_width)


def _rows(x: torch.Tensor, k: int) -> torch.Tensor:
    """[..., K] as [M, K]; raises KernelError (LB0417) for another width, which reshaping alone could hide."""
    if x.dim() == 0 or x.shape[-1] != k:
        raise KernelError(
            "LB0417", f"a quantized layer has {k} input features, and was called with {list(x.shape)}",
            hint=f"give it [..., {k}]",
        )  # fmt: skip
    return x.reshape(x.shape[:-1].numel(), k)


def run_linear(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    spec: str,
    out: torch.Tensor,
) -> None:
    """Run the kernel of `spec` on contiguous rows: x [M, K], residual and out [M, N] of one type; M may be 0."""
    _run(x, _packed(weight, spec), bias, residual, spec, out)


def _run(
    x: torch.Tensor,
    packed: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    spec: str,
    out: torch.Tensor,
) -> None:
    if m := x.shape[0]:
        kernel = kernel_for(spec, x.dtype, x.device, m)
        kernel.launch(x, packed, None if bias is None else bias.float().contiguous(), residual, out)


def _linear_fake(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    spec: str,
) -> torch.Tensor:
    k, n_out = _shape(spec)
    torch._check(x.shape[-1] == k, lambda: f"expected {k} input features, got {x.shape[-1]}")
    return x.new_empty((*x.shape[:-1], n_out), dtype=_out_dtype(spec) or x.dtype)


def output_features(spec: str) -> int:
    """Columns of what a kernel gives."""
    return _shape(spec)[1]


@cache
def _shape(spec: str) -> tuple[int, int]:
    """(input features, output features), without the tables that `KernelSpec` makes: under a fake-tensor mode they
    would be fake."""
    values = json.loads(spec)
    first, *rest = values["segments"]
    k, n = values["k"], first if "silu_mul" in values["epilogue"] else first + sum(rest)
    if values["x_dtype"] == ROUNDED:
        k = RoundedRows(parse_activation(values["activation"]), k).row_bytes
    if text := values.get("out_activation"):
        n = RoundedRows(parse_activation(text), n).row_bytes
    return k, n


@cache
def _out_dtype(spec: str) -> torch.dtype | None:
    """Type of what a kernel gives, or None for that of its input."""
    values = json.loads(spec)
    if values.get("out_activation"):
        return torch.uint8
    return _TORCH_DTYPES[values["out_dtype"]] if values["x_dtype"] == ROUNDED else None


# torch.compile traces what Python it meets while compiled code runs; the operator's inside is not for it.
_SKIP = eval_frame._FrameAction.SKIP
eval_frame.set_code_exec_strategy(_linear.__code__, eval_frame._FrameExecStrategy(_SKIP, _SKIP))

for _key in ("CPU", "CUDA"):
    LIBRARY.impl("linear", _linear, _key)
LIBRARY.impl("linear_python", _linear, "CPU")
torch.library.register_fake("lowbit::linear", _linear_fake, lib=LIBRARY)
