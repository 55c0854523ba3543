"""CUDA's driver, called directly: load a cubin, launch its kernel on a stream. torch has made the context."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from lowbit.compiler.errors import KernelError

__all__ = ["Kernel", "driver", "tensor_map"]

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PROGRAMMATIC = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint64 * 8)]


class _Config(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_uint) for name in ("gx", "gy", "gz", "bx", "by", "bz", "shared")],
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


@cache
def driver() -> ctypes.CDLL:
    """The driver's library; raises KernelError (LB0465) where there is none."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise KernelError("LB0465", "CUDA's driver library was not found", hint="install the GPU's driver")


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise KernelError("LB0465", f"{what} failed: {(text.value or b'unknown error').decode()} ({status})")


_UINT8, _UINT16, _SWIZZLE_128, _PROMOTE_256 = 0, 1, 3, 3  # of CUtensorMap's enumerations


def tensor_map(
    address: int, rows: int, columns: int, width: int, box_rows: int, line: int
) -> ctypes.Array[ctypes.c_uint64]:
    """A descriptor of a row-major matrix at a device address, for copies of 128 bytes x `box_rows` rows whose 16-byte
    pieces are exchanged within 1024 bytes. width: bytes of an element. line: bytes from row to row, a multiple of 16.
    Zeros are read where the matrix has ended."""
    # The driver wants the structure at a multiple of 64 bytes.
    room = (ctypes.c_uint64 * 24)()
    first = -ctypes.addressof(room) % 64 // 8
    found = ctypes.c_void_p(ctypes.addressof(room) + 8 * first)
    sizes, stride = (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(line)
    box, steps = (ctypes.c_uint32 * 2)(128 // width, box_rows), (ctypes.c_uint32 * 2)(1, 1)
    kind = _UINT8 if width == 1 else _UINT16
    status = driver().cuTensorMapEncodeTiled(
        found, kind, 2, ctypes.c_void_p(address), sizes, stride, box, steps, 0, _SWIZZLE_128, _PROMOTE_256, 0
    )
    _check(status, "describing activations")
    return (ctypes.c_uint64 * 16)(*room[first : first + 16])


class Kernel:
    """One kernel of a cubin (a file, or its bytes), loaded into a device's context when it is first launched there."""

    def __init__(self, cubin: Path | bytes, name: str, threads: int, shared_bytes: int, early: bool = False) -> None:
        self._image, self._name = cubin if isinstance(cubin, bytes) else cubin.read_bytes(), name.encode()
        self._threads, self._shared, self._early = threads, shared_bytes, early
        self._functions: dict[int, ctypes.c_void_p] = {}

    def load(self, device: int) -> ctypes.c_void_p:
        """The kernel on a device, whose context must be current."""
        found = self._functions.get(device)
        if found is None:
            module, found = ctypes.c_void_p(), ctypes.c_void_p()
            _check(driver().cuModuleLoadData(ctypes.byref(module), self._image), "loading a kernel")
            _check(driver().cuModuleGetFunction(ctypes.byref(found), module, self._name), "finding a kernel")
            _check(driver().cuFuncSetAttribute(found, _MAX_DYNAMIC_SHARED, self._shared), "reserving shared memory")
            self._functions[device] = found
        return found

    def launch(
        self, grid: tuple[int, int], args: ctypes.Structure, device: torch.device, offsets: tuple[int, ...] = (0,)
    ) -> None:
        """Launch on the device's current torch stream. `args` is copied before this returns; it is the kernel's one
        parameter, or has its parameters at `offsets`."""
        index = device.index if device.index is not None else torch.cuda.current_device()
        with torch.cuda.device(index):
            function = self.load(index)
            config = _Config(*grid, 1, self._threads, 1, 1, self._shared, torch.cuda.current_stream(index).cuda_stream)
            if self._early:  # may start before the kernel ahead of it has ended; it waits before it reads activations
                attribute = _Attribute(_PROGRAMMATIC, 0, (1, 0, 0, 0, 0, 0, 0, 0))
                config.attributes, config.count = ctypes.pointer(attribute), 1
            pointers = (ctypes.c_void_p * len(offsets))(*[ctypes.addressof(args) + at for at in offsets])
            _check(driver().cuLaunchKernelEx(ctypes.byref(config), function, pointers, None), "launching a kernel")
