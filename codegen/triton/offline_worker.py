"""Compiles generated modules for named GPUs, without a GPU; run as a process of its own by `offline`.

Standard input: a JSON list of {"module": file, "out": folder, "arch": "sm_90"}. Each job leaves `<kernel>.cubin`,
`<kernel>.ptx` in its folder; standard output is a JSON list with the kernels' facts, or the compiler's error.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["compile_job", "main"]


def compile_job(job: dict[str, str]) -> dict[str, Any]:
    """Compile every kernel of one module; returns {kernel name: {"shared": bytes, "warps": n}} or {"error": text}."""
    from lowbit.codegen.triton.launch import kernels_of, load_module

    module = load_module(Path(job["module"]))
    try:
        return {
            fn.__name__: _compile(fn, args, options, job["arch"], Path(job["out"]))
            for fn, args, options in kernels_of(module)
        }
    except Exception as e:  # whatever the compiler raises is the report
        return {"error": f"{type(e).__name__}: {e}"}


def _compile(fn: Any, args: dict[str, str], options: dict[str, Any], arch: str, out: Path) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    # Pointers of fresh tensors are 16-byte aligned; the launcher checks it, as Triton's own specialisation would.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(args.values()) if kind.startswith("*")}
    source = ASTSource(fn=fn, signature=dict(args), constexprs={}, attrs=aligned)
    number = int(arch.removeprefix("sm_").rstrip("a"))
    built = triton.compile(source, target=GPUTarget("cuda", number, 32), options=dict(options))
    (out / f"{fn.__name__}.cubin").write_bytes(built.asm["cubin"])
    (out / f"{fn.__name__}.ptx").write_text(built.asm["ptx"])
    return {"shared": int(built.metadata.shared), "warps": int(built.metadata.num_warps)}


def main() -> None:
    """Read jobs from standard input, compile, write results to standard output."""
    results = [compile_job(job) for job in json.load(sys.stdin)]
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()
