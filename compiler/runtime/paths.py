"""Has trellises' codes searched by compiled code, where there is a compiler."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from lowbit.codegen.cpp.paths import PathsSpec, load_paths, paths_source
from lowbit.codegen.select import say_once
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import host_target
from lowbit.compiler.runtime.compiled import compiled
from lowbit.quantizers.formats import Element, Format, WeightFormat
from lowbit.quantizers.methods.trellis import Paths, cheapest_paths, use_search

__all__ = ["prepare_search"]


def prepare_search(fmt: WeightFormat) -> None:
    """Before a matrix is quantized to `fmt`: where that is a trellis, have its paths searched by compiled code."""
    if isinstance(fmt, Format) and fmt.element.window > 1:
        use_search(_search)


def _search(element: Element, target: Tensor, importance: Tensor, register: Tensor) -> Tensor:
    on_cpu = target.device.type == "cpu"
    search = _compiled(element.bits, element.state_bits) if on_cpu else cheapest_paths
    return search(element, target, importance, register)


@cache
def _compiled(bits: int, state_bits: int) -> Paths:
    try:
        spec = PathsSpec(bits, state_bits)
        source = paths_source(spec, host_target().arch)
        return load_paths(compiled(spec, source, "the search for codes of trellises"))
    except KernelError as e:
        say_once(f"codes of trellises are searched by torch, which takes about twenty times as long: {e.message}")
        return cheapest_paths
