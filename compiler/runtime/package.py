"""Running what `lowbit.export` wrote: an AOTInductor package whose kernels lie beside it.

Only lowbit's operator is registered; the model's code, transformers and compilers are not needed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import lowbit.compiler.runtime.embedding  # noqa: F401  (with it come the operators that a package calls)
from lowbit.compiler.errors import KernelError, RunError
from lowbit.compiler.io.kernels import FOLDER, MANIFEST, KernelFolder, read_kernels
from lowbit.compiler.ir.target import host_target
from lowbit.compiler.runtime import prebuilt

__all__ = ["CALL", "PACKAGE", "describe_call", "load_exported"]

PACKAGE = "model.pt2"
"""The package's name in its folder."""

CALL = "call.json"
"""What the package's function takes: compiled code does not look."""


def load_exported(folder: str | Path, *, frozen: bool = True) -> Callable[..., Tensor]:
    """The function in `folder`: token ids [1, tokens] to logits, or whatever was exported.

    Package and kernels are code: load only what you trust. frozen: from now on nothing is compiled in this process.
    Raises RunError LB0576 where there is no package, KernelError LB0482 where its kernels are missing, LB0480 for one
    that is damaged, LB0483 when none of them runs on this machine; the function RunError LB0580 for other inputs than
    were exported. Without a compiler torch cannot look up what the CPU can do and logs that the package is outdated; it
    loads it all the same.
    """
    folder = Path(folder)
    package = folder / PACKAGE
    for name in (PACKAGE, CALL):
        if not (folder / name).is_file():
            hint = "give the folder lowbit.export wrote"
            raise RunError("LB0576", f"there is no {name}", where=str(folder), hint=hint)
    expected = json.loads((folder / CALL).read_text(encoding="utf-8"))
    kernels = read_kernels(folder)
    if kernels is None or not kernels.kernels:
        hint = f"copy the folder `{FOLDER}` along with {PACKAGE}, or call lowbit.export again"
        raise KernelError("LB0482", f"the package's kernel library {MANIFEST} is missing", where=str(folder), hint=hint)
    _check(kernels)
    prebuilt.use_kernels(folder, trust=True)
    if frozen:
        prebuilt.freeze(f"the package {package} was loaded")
    run: Callable[..., Tensor] = torch._inductor.aoti_load_package(str(package))

    def call(x: Tensor) -> Tensor:
        _check_call(x, **expected)
        return run(x)

    return call


def describe_call(example: Tensor, at: int, most: int) -> dict[str, object]:
    """What a package takes: tensors like `example`, with 1 to `most` entries in dimension `at`."""
    return {"dtype": str(example.dtype), "shape": list(example.shape), "at": at, "most": most}


def _check_call(x: Tensor, dtype: str, shape: list[int], at: int, most: int) -> None:
    """Raise RunError (LB0580) for what the package was not made for: it would read the memory as if it were."""
    fits = x.dim() == len(shape) and 1 <= x.shape[at] <= most
    if not fits or str(x.dtype) != dtype or any(x.shape[i] != n for i, n in enumerate(shape) if i != at):
        wanted = [f"1 to {most}" if i == at else str(n) for i, n in enumerate(shape)]
        why = f"the package takes {dtype} [{', '.join(wanted)}], not {x.dtype} {list(x.shape)}"
        raise RunError("LB0580", why, hint="convert the input, or export with another example or max_tokens")


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
