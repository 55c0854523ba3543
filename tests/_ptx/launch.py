"""Running a kernel's PTX on tensors of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from _ptx import ops_async, ops_bits, ops_convert, ops_fence, ops_float, ops_matrix, ops_warp, ops_wgmma  # noqa: F401
from _ptx.block import Program, ThreadBlock
from _ptx.build import Builder
from _ptx.errors import PtxError
from _ptx.memory import LOCAL, NAMED, PARAM, SHARED_START, Buffer, Memory
from _ptx.parse import Kernel, Module, Variable, parse
from _ptx.program import build
from _ptx.tensor_map import TensorMap
from _ptx.values import Array

__all__ = ["Arg", "Loaded", "Struct", "run_ptx"]


@dataclass(frozen=True)
class Struct:
    """Bytes of a by-value parameter. maps: tensor maps in it, by offset. tensors: what its pointers point to."""

    data: bytes
    tensors: Sequence[torch.Tensor] = ()
    maps: dict[int, TensorMap] = field(default_factory=dict)


Arg = torch.Tensor | int | float | bytes | Struct | TensorMap | None
"""A tensor is passed as its address, None as a null pointer."""


class Loaded:
    """A kernel of a PTX text, to be launched any number of times."""

    def __init__(self, text: str, name: str = "") -> None:
        module = parse(text)
        if not name and len(module.kernels) == 1:
            (name,) = module.kernels
        if name not in module.kernels:
            raise PtxError(f"no kernel {name!r}; there are {', '.join(module.kernels) or 'none'}")
        self.kernel = module.kernels[name]
        self._lay_out(module, self.kernel)
        self.program: Program = build(self.kernel, Builder(self.addresses), self.local_bytes)

    def _lay_out(self, module: Module, kernel: Kernel) -> None:
        """Addresses of variables and parameters. Memory whose size the launch chooses comes last."""
        self.addresses = {p.name: PARAM + p.offset for p in kernel.params}
        self.named = bytearray()
        self.static_shared, self.local_bytes = 0, 0
        everything = [*module.variables, *kernel.variables]
        for v in sorted(everything, key=lambda v: v.space == "shared" and v.size == 0):
            self.addresses[v.name] = self._place(v)

    def _place(self, v: Variable) -> int:
        if v.space == "shared":
            self.static_shared += -self.static_shared % v.align
            at = self.static_shared
            self.static_shared += v.size
            return SHARED_START + at
        if v.space == "local":
            self.local_bytes += -self.local_bytes % v.align
            at = self.local_bytes
            self.local_bytes += v.size
            return LOCAL + at
        self.named += bytes(-len(self.named) % v.align)
        at = len(self.named)
        self.named += v.data + bytes(v.size - len(v.data))
        return NAMED + at

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        args: Sequence[Arg],
        tensors: Sequence[torch.Tensor] = (),
        order: Sequence[int] | None = None,
        apart: Sequence[int] | None = None,
        registers_at_issue: bool = False,
    ) -> None:
        """Run all thread blocks, one after another. tensors: what pointers inside of structs lead to.

        order: numbers of thread blocks (x first), where another than the usual order is wanted. apart: numbers of
        warps, where each is to run as far as it gets before the next one does. registers_at_issue: wgmma reads operands
        in registers when it is issued, so that they may change before it is waited for; PTX does not promise that, but
        there are compilers that count on it. Raises PtxError.
        """
        grid, shape = _three(grid), _three(block)
        self.local_bytes += -self.local_bytes % 16
        self.program.local_bytes = self.local_bytes
        params, found, maps = self._params(args)
        threads = -(-int(np.prod(shape)) // 32) * 32
        memories = {
            "global": Memory("global", [*_buffers([*found, *tensors]), self._named()]),
            "param": Memory("parameter", [Buffer.of_array("parameters", PARAM, params)]),
            "local": Memory("local", [Buffer.of_array("stack", LOCAL, _filled(threads * self.local_bytes))]),
        }
        for number in order if order is not None else range(int(np.prod(grid))):
            place = (number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1]))
            memories["shared"] = self._shared(shared_bytes)
            one = ThreadBlock(self.program, grid, shape, place, dict(memories), apart)
            one.copies |= {"maps": maps, "registers at issue": registers_at_issue}
            one.run()
            self._check_end(one)

    def _check_end(self, c: ThreadBlock) -> None:
        if c.flights:
            raise PtxError(f"{self.kernel.name}, block {tuple(c.place)}: ended while {len(c.flights)} bulk copies fly")
        for group in [*c.copies.get("out groups", []), c.copies.get("out", [])]:
            for write in group:
                write()

    def _named(self) -> Buffer:
        size = len(self.named) + -len(self.named) % 16
        return Buffer.of_array("variables", NAMED, np.frombuffer(self.named.ljust(size, b"\0"), dtype=np.uint8).copy())

    def _shared(self, dynamic: int) -> Memory:
        size = self.static_shared + dynamic
        data = _filled(size + -size % 1024)
        return Memory("shared", [Buffer("shared memory", SHARED_START, SHARED_START + size, SHARED_START, data)])

    def _params(self, args: Sequence[Arg]) -> tuple[Array, list[torch.Tensor], dict[int, TensorMap]]:
        if len(args) != len(self.kernel.params):
            raise PtxError(f"{self.kernel.name} takes {len(self.kernel.params)} arguments; {len(args)} were given")
        size = self.kernel.param_bytes
        data = np.zeros(size + -size % 16, dtype=np.uint8)
        tensors: list[torch.Tensor] = []
        maps: dict[int, TensorMap] = {}
        for param, arg in zip(self.kernel.params, args, strict=True):
            raw = _raw(arg, param.size)
            if len(raw) > param.size:
                raise PtxError(f"parameter {param.name} has {param.size} bytes; {len(raw)} were given")
            data[param.offset : param.offset + len(raw)] = np.frombuffer(raw, dtype=np.uint8)
            if isinstance(arg, torch.Tensor):
                tensors.append(arg)
            elif isinstance(arg, Struct):
                tensors += arg.tensors
                maps |= {PARAM + param.offset + at: m for at, m in arg.maps.items()}
            elif isinstance(arg, TensorMap):
                maps[PARAM + param.offset] = arg
        return data, tensors, maps


def run_ptx(
    text: str,
    kernel_name: str,
    grid: Sequence[int],
    block: Sequence[int],
    shared_bytes: int,
    args: Sequence[Arg],
    tensors: Sequence[torch.Tensor] = (),
    order: Sequence[int] | None = None,
    apart: Sequence[int] | None = None,
) -> None:
    """Run a kernel once: see `Loaded.launch`. An empty name means the only kernel of the text."""
    Loaded(text, kernel_name).launch(grid, block, shared_bytes, args, tensors, order, apart)


def _raw(arg: Arg, size: int) -> bytes:
    if isinstance(arg, torch.Tensor):
        return arg.data_ptr().to_bytes(8, "little")
    if isinstance(arg, Struct):
        return bytes(arg.data)
    if isinstance(arg, TensorMap):
        return bytes(128)
    if isinstance(arg, bytes):
        return arg
    if isinstance(arg, float):
        return np.array(arg, dtype=np.float32 if size == 4 else np.float64).tobytes()
    return ((arg or 0) % (1 << 8 * size)).to_bytes(size, "little")


def _buffers(tensors: Sequence[torch.Tensor]) -> list[Buffer]:
    unique = {(t.data_ptr(), t.numel() * t.element_size()): t for t in tensors}
    return [Buffer.of_tensor(f"{str(t.dtype)[6:]}{list(t.shape)}", t) for t in unique.values()]


def _filled(size: int) -> Array:
    """Bytes that are no number and no sensible integer."""
    return np.full(size, 0xFF, dtype=np.uint8)


def _three(shape: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*shape, 1, 1, 1)[:3]
    return x, y, z
