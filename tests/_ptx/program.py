"""Instructions -> places (straight runs), with branches between them and gates where threads wait."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from _ptx.block import Gate, Place, Program, ThreadBlock
from _ptx.build import Builder
from _ptx.errors import PtxError
from _ptx.lanes import Lanes
from _ptx.parse import Instruction, Kernel, Name
from _ptx.values import Array

__all__ = ["GATES", "build", "gate"]

_ENDS = ("bra", "brx", "ret", "exit", "trap")
GATES: dict[str, Callable[[Builder, Instruction], Gate | None]] = {}
"""First part of the name of instructions for which threads may have to wait -> what makes their gate."""


def gate(*names: str) -> Callable[..., Callable[[Builder, Instruction], Gate | None]]:
    """Register what makes the gate of instructions whose name starts so; it may be None after all."""

    def register(make: Callable[[Builder, Instruction], Gate | None]) -> Callable[[Builder, Instruction], Gate | None]:
        for name in names:
            GATES[name] = make
        return make

    return register


def build(kernel: Kernel, builder: Builder, local_bytes: int) -> Program:
    """Raises PtxError for branches to nowhere."""
    starts = _starts(kernel)
    number = {start: i for i, start in enumerate(starts)}
    places = []
    for start, end in zip(starts, [*starts[1:], len(kernel.code)], strict=True):
        places.append(_place(kernel, kernel.code[start:end], builder, number))
    places.append(Place(end=_leave, ops=[]))  # falling off the end is a return
    return Program(kernel.name, places, kernel.widths, local_bytes)


def _starts(kernel: Kernel) -> list[int]:
    starts = {0, *(at for at in kernel.labels.values() if at < len(kernel.code))}
    for at, i in enumerate(kernel.code):
        if i.parts[0] in _ENDS and at + 1 < len(kernel.code):
            starts.add(at + 1)
        elif i.parts[0] in GATES:
            starts |= {at} | ({at + 1} if at + 1 < len(kernel.code) else set())
    return sorted(starts)


def _place(kernel: Kernel, code: list[Instruction], builder: Builder, number: dict[int, int]) -> Place:
    place = Place(first=code[0], last=code[-1])
    if code[0].parts[0] in GATES:
        place.gate = GATES[code[0].parts[0]](builder, code[0])
        if place.gate is not None and code[0].guard is not None:
            place.guard = builder.get(code[0].guard, "pred")
    if code[-1].parts[0] in _ENDS:
        place.end = _end(kernel, code[-1], builder, number)
        code = code[:-1]
    place.ops = [(builder.op(i), i) for i in code]
    return place


def _end(
    kernel: Kernel, i: Instruction, builder: Builder, number: dict[int, int]
) -> Callable[..., list[tuple[int, Lanes]]]:
    wanted = None if i.guard is None else builder.get(i.guard, "pred")
    if i.parts[0] in ("ret", "exit"):
        go: Callable[..., list[tuple[int, Lanes]]] = _leave
    elif i.parts[0] == "trap":
        go = _trap
    elif i.parts[0] == "brx":
        go = _table(kernel, i, builder, number)
    else:
        target = i.operands[0]
        assert isinstance(target, Name)
        there = _where(kernel, target.name, number)
        go = lambda c, lanes, at: [(there, lanes)]  # noqa: E731
    if wanted is None:
        return go
    return _conditional(wanted, go)


def _conditional(
    wanted: Callable[[ThreadBlock], Array], go: Callable[..., list[tuple[int, Lanes]]]
) -> Callable[..., list[tuple[int, Lanes]]]:
    def end(c: ThreadBlock, lanes: Lanes, at: int) -> list[tuple[int, Lanes]]:
        truth = wanted(c)
        yes = truth if lanes.full else truth & lanes.mask
        if not yes.any():
            return [(at + 1, lanes)]
        if np.array_equal(yes, lanes.mask):
            return go(c, lanes, at)
        ways = [*go(c, Lanes(yes.copy(), False), at), (at + 1, Lanes(lanes.mask & ~yes, False))]
        return sorted(ways, key=lambda way: way[0])

    return end


def _where(kernel: Kernel, label: str, number: dict[int, int]) -> int:
    if label not in kernel.labels:
        raise PtxError(f"{kernel.name}: no label {label}")
    return number.get(kernel.labels[label], len(number))


def _table(
    kernel: Kernel, i: Instruction, builder: Builder, number: dict[int, int]
) -> Callable[..., list[tuple[int, Lanes]]]:
    name = i.operands[1]
    assert isinstance(name, Name)
    targets = [_where(kernel, label, number) for label in kernel.tables[name.name]]
    index = builder.get(i.operands[0], "u32")

    def end(c: ThreadBlock, lanes: Lanes, at: int) -> list[tuple[int, Lanes]]:
        chosen = index(c)
        ways = [(there, lanes.also(chosen == j)) for j, there in enumerate(targets)]
        return [(there, some) for there, some in ways if not some.empty]

    return end


def _leave(c: ThreadBlock, lanes: Lanes, at: int) -> list[tuple[int, Lanes]]:
    c.leave(lanes)
    return []


def _trap(c: ThreadBlock, lanes: Lanes, at: int) -> list[tuple[int, Lanes]]:
    raise c.located(PtxError("trap"), lanes)
