"""`lowbit::attend_rows`: attention of a single token over keys and values as they are, for torch.compile on CPUs.

The kernel is that of packed caches with nothing packed. Keys that a mask hides are not read, however many tokens a
cache was allocated for. Other calls, and machines without a compiler, get torch's attention.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lowbit.codegen.attend import LANES, WINDOWS, AttendSpec
from lowbit.codegen.cpp.attend_launch import AttendKernel
from lowbit.codegen.select import say_once
from lowbit.compiler.errors import KernelError
from lowbit.compiler.runtime.attend import attend_kernel
from lowbit.compiler.runtime.ops import LIBRARY

__all__ = ["attends"]

_NAMES = {dtype: name for name, dtype in WINDOWS.items()}


def attends(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for heads of this size and type; builds it."""
    return _kernel(head_dim, dtype) is not None


@cache
def _kernel(head_dim: int, dtype: torch.dtype) -> AttendKernel | None:
    if head_dim % LANES or dtype not in _NAMES:
        return None
    try:
        return attend_kernel(AttendSpec("kv16", head_dim, _NAMES[dtype]).key())
    except KernelError as e:  # a frozen process without it, or a compiler that fails: torch's attention is there
        say_once(f"attention of single tokens runs on torch: {e.message}")
        return None


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    kernel = _kernel(q.shape[3], keys.dtype)
    if kernel is not None and _plain(q, keys, values, mask):
        return kernel.attend(q.float(), [keys, values], keys.shape[2], mask, scale).to(q.dtype)
    return scaled_dot_product_attention(q, keys, values, mask, scale=scale, enable_gqa=True).contiguous()


def _plain(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernel reads these as they are: one query, nothing repeated for a sequence or a key, no strides."""
    if q.shape[2] != 1 or q.shape[0] != keys.shape[0] or (mask is not None and mask.shape[3] != keys.shape[2]):
        return False
    alike = keys.shape == values.shape and keys.dtype == values.dtype
    return alike and keys.is_contiguous() and values.is_contiguous()


def _attend_fake(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty(q.shape)


LIBRARY.define(
    "attend_rows(Tensor q, Tensor keys, Tensor values, Tensor? mask, float scale) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
LIBRARY.impl("attend_rows", _attend, "CPU")
torch.library.register_fake("lowbit::attend_rows", _attend_fake, lib=LIBRARY)
