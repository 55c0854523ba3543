"""The torch operator behind every quantized layer: `torch.ops.lowbit.linear`.

One op with plain tensors and the kernel's spec as text, so that torch.compile, torch.export and CUDA graphs see a
single opaque call. The raw Library API is used because a call costs about 2 us, against 16 us for
`torch.library.custom_op`.
"""

from __future__ import annotations

import json
from functools import cache

import torch
from torch._C._dynamo import eval_frame

from lowbit.compiler.runtime.dispatch import kernel_for, parse_spec
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["LIBRARY", "output_features", "run_linear"]

LIBRARY = torch.library.Library("lowbit", "DEF")
LIBRARY.define(
    "linear(Tensor x, Tensor[] weight, Tensor? bias, Tensor? residual, str spec) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _linear(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    spec: str,
) -> torch.Tensor:
    s = parse_spec(spec)
    flat = x.reshape(-1, s.k).contiguous()
    out = torch.empty((flat.shape[0], s.n_out), dtype=x.dtype, device=x.device)
    rest = None if residual is None else residual.reshape(-1, s.n_out).to(x.dtype).contiguous()
    run_linear(flat, weight, bias, rest, spec, out)
    return out.view(*x.shape[:-1], s.n_out)


def run_linear(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    spec: str,
    out: torch.Tensor,
) -> None:
    """Run the kernel of `spec` on contiguous rows: x [M, K], residual and out [M, N] of one type; M may be 0."""
    if not x.shape[0]:
        return
    s = parse_spec(spec)
    kernel = kernel_for(spec, x.dtype, x.device, x.shape[0])
    packed = PackedWeight(s.weight_format, s.layout_, s.segments, s.k, dict(zip(s.operands, weight, strict=True)))
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
    return x.new_empty((*x.shape[:-1], n_out))


def output_features(spec: str) -> int:
    """Columns of what a kernel gives."""
    return _shape(spec)[1]


@cache
def _shape(spec: str) -> tuple[int, int]:
    """(input features, output features), without the tables that `KernelSpec` makes: under a fake-tensor mode they
    would be fake."""
    values = json.loads(spec)
    first, *rest = values["segments"]
    return values["k"], first if "silu_mul" in values["epilogue"] else first + sum(rest)


# torch.compile traces what Python it meets while compiled code runs; the operator's inside is not for it.
_SKIP = eval_frame._FrameAction.SKIP
eval_frame.set_code_exec_strategy(_linear.__code__, eval_frame._FrameExecStrategy(_SKIP, _SKIP))

for _key in ("CPU", "CUDA"):
    LIBRARY.impl("linear", _linear, _key)
torch.library.register_fake("lowbit::linear", _linear_fake, lib=LIBRARY)
