"""Running what `lowbit.export` wrote: an AOTInductor package whose kernels lie beside it.

Only lowbit's operator is registered; the model's code, transformers and compilers are not needed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import lowbit.compiler.runtime.embedding  # noqa: F401  (with it come the operators that a package calls)
from lowbit.compiler.errors import KernelError, RunError
from lowbit.compiler.io.kernels import FOLDER, MANIFEST, KernelFolder, read_kernels
from lowbit.compiler.ir.target import host_target
from lowbit.compiler.runtime import prebuilt

__all__ = ["PACKAGE", "load_exported"]

PACKAGE = "model.pt2"
"""The package's name in its folder."""


def load_exported(folder: str | Path, *, frozen: bool = True) -> Callable[..., Tensor]:
    """The function in `folder`: token ids [1, tokens] to logits, or whatever was exported.

    Package and kernels are code: load only what you trust. frozen: from now on nothing is compiled in this process.
    Raises RunError LB0576 where there is no package, KernelError LB0482 where its kernels are missing, LB0480 for one
    that is damaged, LB0483 when none of them runs on this machine. Without a compiler torch cannot look up what the CPU
    can do and logs that the package is outdated; it loads it all the same.
    """
    folder = Path(folder)
    package = folder / PACKAGE
    if not package.is_file():
        raise RunError(
            "LB0576", f"there is no {PACKAGE}", where=str(folder), hint="give the folder lowbit.export wrote"
        )
    kernels = read_kernels(folder)
    if kernels is None or not kernels.kernels:
        hint = f"copy the folder `{FOLDER}` along with {PACKAGE}, or call lowbit.export again"
        raise KernelError("LB0482", f"the package's kernel library {MANIFEST} is missing", where=str(folder), hint=hint)
    _check(kernels)
    prebuilt.use_kernels(folder, trust=True)
    if frozen:
        prebuilt.freeze(f"the package {package} was loaded")
    run: Callable[..., Tensor] = torch._inductor.aoti_load_package(str(package))
    return run


def _check(kernels: KernelFolder) -> None:
    """Every file is there and unaltered, and made for a machine like this one."""
    usable = prebuilt.runnable_targets(host_target())
    for kernel in kernels.kernels:
        kernels.path(kernel)
    if not any(kernel.target in usable for kernel in kernels.kernels):
        raise KernelError(
            "LB0483",
            f"the package's kernels are for {', '.join(kernels.targets)}, this machine is {host_target()}",
            where=str(kernels.folder),
            hint="call lowbit.export on a machine like this one",
        )
