"""Reading what decoupleQ's released code saves (`true_quant.pth`), and turning it into a checkpoint.

The file is a pickled state dict of a model: for a quantized layer `{path}.weight` int8 [N, K] with one number per
element, `{path}.weight_qscale` [N, groups] and, unless the run was symmetric, `{path}.weight_qzero` [N, groups], the
additive offset in floats: value = number * scale + offset. Only tensors are unpickled (`weights_only`), so a file
cannot run code. After "decoupleQ: Towards 2-bit Post-Training Uniform Quantization via decoupling Parameters into
Integer and Floating Points" (Guo et al.).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.checkpoint import write_checkpoint
from lowbit.compiler.io.source import open_model
from lowbit.quantizers.formats import WIDE_DTYPES, Format, Granularity, IntElement
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.scheme import Scheme

__all__ = ["convert", "read"]

_SCALE, _ZERO = ".weight_qscale", ".weight_qzero"
_NAMES = {dtype: name for name, dtype in WIDE_DTYPES.items()}


def read(path: str | Path, *, bits: int | None = None, scale: str | None = None) -> dict[str, QTensor]:
    """The quantized weights of a `true_quant.pth` by module path, in `intB.gG.fz` (`ch` for one group per row).

    bits: of the numbers; when None the fewest, from 2, that hold every number in the file. scale: type of scales and
    offsets (`f16`, `bf16`, `f32`); the stored one when None. Layers without offsets get `intB.gG.sym`. Raises
    CheckpointError: LB0101 no such file, LB0119 not a file of this kind, or one that contradicts itself.
    """
    state = _load(Path(path).expanduser())
    layers = [name.removesuffix(_SCALE) for name in state if name.endswith(_SCALE)]
    if not layers:
        raise _refused(f"has no tensor whose name ends in {_SCALE}", str(path))
    for name in layers:
        _check(state, name, f"{path}: {name}")
    if bits is not None and not 2 <= bits <= 8:
        raise _refused(f"numbers have 2 to 8 bits, not {bits}", str(path))
    bits = bits or max(_bits(state[f"{name}.weight"]) for name in layers)
    return {name: _qtensor(state, name, bits, scale, f"{path}: {name}") for name in layers}


def convert(path: str | Path, base: str | Path, out: str | Path, *, bits: int | None = None) -> Path:
    """Write a `true_quant.pth` as a checkpoint that `load_quantized` reads; returns `out`.

    base: the model that was quantized, as `open_model` takes it. Other tensors of the file replace the model's, because
    decoupleQ may train norms and biases. Raises CheckpointError as `read`, `open_model` and `write_checkpoint`.
    """
    source, state = open_model(str(base)), _load(Path(path).expanduser())
    weights = read(path, bits=bits)
    formats = tuple((name, q.fmt) for name, q in weights.items())
    scheme = Scheme("decoupleq", formats[0][1], "decoupleq", ignore=("*",), overrides=formats)
    loaders = {name: (lambda q=q: q) for name, q in weights.items()}
    taken = {f"{name}.weight" for name in weights}
    replaced = {
        name: (lambda value=state[name]: value.contiguous())
        for name in source.names()
        if name in state and name not in taken
    }
    for name in replaced:
        if tuple(state[name].shape) != source.shape(name):
            why = f"{name} is {list(state[name].shape)}, the base model's is {list(source.shape(name))}"
            raise _refused(why, str(path))
    return write_checkpoint(Path(out), source, loaders, scheme, report={}, replaced=replaced)


def _load(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError("LB0101", "no such file", where=str(path))
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, ValueError, OSError, EOFError, KeyError, pickle.UnpicklingError) as e:
        raise _refused(f"cannot be read: {str(e).splitlines()[0][:200]}", str(path)) from e
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise _refused("is not a state dict", str(path))
    return dict(state)


def _refused(why: str, where: str) -> CheckpointError:
    return CheckpointError("LB0119", why, where=where, hint="give decoupleQ's true_quant.pth")


def _check(state: Mapping[str, Tensor], name: str, where: str) -> None:
    """Types and shapes of one layer's tensors."""
    codes, scale = state.get(f"{name}.weight"), state[f"{name}{_SCALE}"]
    if codes is None or codes.dtype != torch.int8 or codes.ndim != 2 or not codes.numel():
        raise _refused("weight must be an int8 matrix", where)
    n, k = codes.shape
    if scale.ndim != 2 or scale.shape[0] != n or not 1 <= scale.shape[1] <= k or k % scale.shape[1]:
        raise _refused(f"scales {list(scale.shape)} do not divide a {n}x{k} weight into equal groups", where)
    if scale.dtype not in _NAMES:
        raise _refused(f"scales are {scale.dtype}, not a float type of 16 or 32 bits", where)
    zero = state.get(f"{name}{_ZERO}")
    if zero is not None and (zero.shape != scale.shape or not zero.is_floating_point()):
        raise _refused(f"offsets must be floats {list(scale.shape)}, not {zero.dtype} {list(zero.shape)}", where)


def _bits(codes: Tensor) -> int:
    """The fewest bits, from 2, of a two's complement number that holds all of `codes`."""
    low, high = (int(v) for v in codes.aminmax())
    return max(2, (max(high, -low - 1)).bit_length() + 1)


def _qtensor(state: Mapping[str, Tensor], name: str, bits: int, scale: str | None, where: str) -> QTensor:
    codes, scales = state[f"{name}.weight"], state[f"{name}{_SCALE}"]
    zero = state.get(f"{name}{_ZERO}")
    if _bits(codes) > bits:
        raise _refused(f"has numbers of {_bits(codes)} bits, not {bits}", where)
    k, groups = codes.shape[1], scales.shape[1]
    granularity = Granularity("g", k // groups) if groups > 1 else Granularity("ch")
    fmt = Format(IntElement(bits, True), granularity, scale or _NAMES[scales.dtype], zero is not None)
    shifted = (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    offset = None if zero is None else zero.to(fmt.scale_dtype).contiguous()
    return QTensor(fmt, shifted, scales.to(fmt.scale_dtype).contiguous(), None, offset)
