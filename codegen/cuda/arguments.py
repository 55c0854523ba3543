"""The kernel's parameter block, as `text/args.cuh` lays it out."""

from __future__ import annotations

import ctypes

import torch

from lowbit.codegen.cuda.any_plan import AnyPlan
from lowbit.quantizers.qtensor import PackedWeight

__all__ = ["KNOWN", "Args", "fill", "order_of"]

KNOWN = frozenset({"plane0", "plane1", "plane2", "scale", "zero", "offset", "tensor_scale", "columns", "channel_scale",
                   "input_scale", "output_scale"})  # fmt: skip
"""Operands of weights that kernels understand. `channel_scale` is part of the packed scales already."""


VECTOR_OPERANDS = ("index", "book", "residual_index", "residual_book", "outlier_index", "outlier_book", "norm_scale",
                   "norm_bias")  # fmt: skip
"""Those of vector formats, in the order of `Args`; they have `columns` too."""


class _Fields(ctypes.Structure):
    _fields_ = [
        ("map", ctypes.c_uint64 * 16),
        ("x", ctypes.c_void_p),
        ("ready", ctypes.c_void_p),
        ("x_scale", ctypes.c_void_p),
        ("columns", ctypes.c_void_p),
        ("input_scale", ctypes.c_void_p),
        ("plane", ctypes.c_void_p * 3),
        ("scale", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("tensor_scale", ctypes.c_void_p),
        *[(name, ctypes.c_void_p) for name in VECTOR_OPERANDS],
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("part", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("tokens", ctypes.c_int),
        ("output_scale", ctypes.c_void_p),
    ]


class Args(ctypes.Structure):
    """Pointers and the number of tokens of one launch; as long as in C++, where it is aligned to 64 bytes."""

    _fields_ = [*_Fields._fields_, ("rest", ctypes.c_uint8 * (-ctypes.sizeof(_Fields) % 64))]


def fill(
    args: Args,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
) -> Args:
    """Set everything but the workspace and the map. The tensors must outlive the launch."""
    args.x, args.out, args.tokens = x.data_ptr(), out.data_ptr(), x.shape[0]
    args.ready = args.x
    for name, tensor in weight.tensors.items():
        if name.startswith("plane"):
            args.plane[int(name[5:])] = tensor.data_ptr()
        elif name != "channel_scale":
            setattr(args, name, tensor.data_ptr())
    args.bias = None if bias is None else bias.data_ptr()
    args.residual = None if residual is None else residual.data_ptr()
    return args


def order_of(plan: AnyPlan, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x with its columns in the weight's order, where no kernel puts them there."""
    order = weight.tensors.get("columns")
    return x if order is None or plan.prepared else x.index_select(1, order)
