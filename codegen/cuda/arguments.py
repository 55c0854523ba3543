"""The kernel's parameter block, as `Args` in `text/memory.cuh` lays it out."""

from __future__ import annotations

import ctypes

import torch

from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["KNOWN", "Args", "fill"]

KNOWN = frozenset({"plane0", "plane1", "plane2", "scale", "zero", "offset", "tensor_scale", "columns", "channel_scale"})
"""Operands of weights that kernels understand. The launcher puts x into the order of `columns`; `channel_scale` is part
of the packed scales already."""


class Args(ctypes.Structure):
    """Pointers and the number of tokens of one launch."""

    _fields_ = [
        ("x", ctypes.c_void_p),
        ("plane", ctypes.c_void_p * 3),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("tensor_scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("part", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
    ]


def fill(
    args: Args,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> Args:
    """Set everything but the workspace. The tensors must outlive the launch. x: columns in the weight's order."""
    args.x, args.out, args.tokens = x.data_ptr(), out.data_ptr(), x.shape[0]
    for name, tensor in weight.tensors.items():
        if name.startswith("plane"):
            args.plane[int(name[5:])] = tensor.data_ptr()
        elif name not in ("columns", "channel_scale"):
            setattr(args, name, tensor.data_ptr())
    args.bias = None if bias is None else bias.data_ptr()
    args.residual = None if residual is None else residual.data_ptr()
    return args
