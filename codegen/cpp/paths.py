"""The search for trellises' codes as compiled code, some twenty times as fast as torch's operations."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch

from lowbit.codegen.backend import Source
from lowbit.codegen.cpp.assemble import ISA_FLAGS
from lowbit.codegen.cpp.toolchain import FLAGS
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.formats import Element
from lowbit.quantizers.methods.trellis import Paths, value_table

__all__ = ["PathsSpec", "load_paths", "paths_source"]


@dataclass(frozen=True)
class PathsSpec:
    """Codes of `bits` bits, registers of `state_bits`."""

    bits: int
    state_bits: int

    def key(self) -> str:
        """Canonical text: equal specs, equal text."""
        return f"paths of {self.bits} in {self.state_bits} bits"


def paths_source(spec: PathsSpec, arch: str) -> Source:
    """The text for an instruction set, and how it is compiled."""
    body = files("lowbit.codegen.cpp").joinpath("text", "paths.cpp").read_text()
    head = f"// {spec.key()}, for {arch}\n#define LB_BITS {spec.bits}\n#define LB_STATES {2**spec.state_bits}\n"
    # Nothing is compared with these sums to the bit, and products that are added at once are half of the work.
    return Source(head + body, ".so", (*FLAGS, *ISA_FLAGS[arch], "-ffp-contract=fast"))


def load_paths(artifact: Path) -> Paths:
    """The search in a shared object; raises KernelError (LB0414) when it cannot be loaded."""
    try:
        run = ctypes.CDLL(str(artifact)).lb_paths
    except (OSError, AttributeError) as e:
        raise KernelError("LB0414", f"cannot load the search {artifact.name}: {e}") from e
    run.restype, run.argtypes = None, [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 2

    def search(
        element: Element, target: torch.Tensor, importance: torch.Tensor, register: torch.Tensor
    ) -> torch.Tensor:
        n, columns = target.shape
        codes = torch.empty(n, columns, dtype=torch.uint8)
        room = torch.empty(columns + 1, 2**element.state_bits)
        given = (target.contiguous(), importance.contiguous(), register.contiguous(), value_table(element), codes, room)
        run(*(t.data_ptr() for t in given), n, columns)
        return codes

    return search
