"""Running generated kernels on the CPU with Triton's interpreter, with honest bfloat16 and float8.

The interpreter computes on numpy arrays. numpy has no bfloat16, so Triton keeps its bits in 16-bit integers and then
adds and multiplies those, and its conversions drop carries and round towards zero. `install` replaces the builder the
interpreter calls by one that widens bfloat16 operands to float32, rounds results once to nearest even, and converts
through torch's own conversions.

`TRITON_INTERPRET=1` has to be set before triton is imported and cannot be undone, so `run_interpreted` uses a process
of its own; calls are batched because starting one takes seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbit.codegen.attend import AttendSpec, parse_attend_spec
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.attend import attend_source
from lowbit.codegen.triton.emitter import emit_source
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.qtensor import PackedWeight

if TYPE_CHECKING:
    import numpy as np

__all__ = ["AttendCall", "Call", "install", "run_interpreted"]

_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@dataclass(frozen=True, eq=False)
class Call:
    """One kernel call: what to compute, how, on what. `source` replaces the emitter's text where it is given."""

    spec: KernelSpec
    schedule: Schedule
    x: torch.Tensor
    weight: PackedWeight
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    source: str = ""


@dataclass(frozen=True, eq=False)
class AttendCall:
    """One call of attention over a packed cache: see `attend_launch.load_attend`."""

    spec: AttendSpec
    q: torch.Tensor
    state: list[torch.Tensor]
    length: int
    mask: torch.Tensor | None = None
    scale: float = 1.0


def run_interpreted(calls: Sequence[Call | AttendCall]) -> list[torch.Tensor]:
    """Outputs [M, n_out] of the calls, computed in one interpreting process.

    Raises KernelError LB0447 with the traceback of the first call that fails, LB0448 when the process dies.
    """
    with tempfile.TemporaryDirectory(prefix="lowbit-interpret-") as scratch:
        folder = Path(scratch)
        torch.save([_to_plain(call) for call in calls], folder / "calls.pt")
        env = {**os.environ, "TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(folder / "triton-cache")}
        done = subprocess.run(
            [sys.executable, "-m", "lowbit.codegen.triton.interpret", scratch],
            capture_output=True,
            text=True,
            env=env,
            check=False,
        )
        if done.returncode:
            raise KernelError("LB0448", f"the interpreting process ended with {done.returncode}: {done.stderr[-2000:]}")
        results: list[torch.Tensor | str] = torch.load(folder / "outs.pt", weights_only=True)
    for i, result in enumerate(results):
        if isinstance(result, str):
            raise KernelError("LB0447", f"call {i} ({calls[i].spec.format}) failed: {result}")
    return [r for r in results if isinstance(r, torch.Tensor)]


def _to_plain(call: Call | AttendCall) -> dict[str, Any]:
    if isinstance(call, AttendCall):
        values = {name: getattr(call, name) for name in ("q", "state", "length", "mask", "scale")}
        return {"attend": call.spec.key(), "source": attend_source(call.spec).text, **values}
    weight = call.weight
    return {
        "spec": asdict(call.spec),
        "schedule": call.schedule.to_dict(),
        "source": call.source or emit_source(call.spec, call.schedule),
        "x": call.x,
        "weight": dict(weight.tensors),
        "bias": call.bias,
        "residual": call.residual,
    }


def _run_call(plain: dict[str, Any], module_file: Path) -> torch.Tensor:
    from lowbit.codegen.triton.attend_launch import load_attend
    from lowbit.codegen.triton.launch import load_module, make_launcher

    if "attend" in plain:
        module_file.write_text(plain["source"])
        attend = load_attend(module_file, parse_attend_spec(plain["attend"]))
        return attend(plain["q"], plain["state"], plain["length"], plain["mask"], plain["scale"])
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain["spec"].items()}
    spec = KernelSpec(**fields)
    weight = PackedWeight(spec.weight_format, spec.layout_, spec.segments, spec.k, plain["weight"])
    module_file.write_text(plain["source"])
    launch = make_launcher(load_module(module_file), spec, Schedule.from_dict(plain["schedule"]))
    x = plain["x"]
    # Poisoned, so that an element no program writes is seen.
    out = torch.full((x.shape[0], spec.n_out), float("nan"), dtype=_DTYPES[spec.out_dtype])
    launch(x, weight, plain["bias"], plain["residual"], out)
    return out


def install() -> None:
    """Make this process's Triton interpreter compute bfloat16 and float8 correctly.

    Raises KernelError LB0449 unless `TRITON_INTERPRET=1` was set when triton was imported.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelError("LB0449", "Triton is not interpreting", hint="set TRITON_INTERPRET=1 before importing triton")
    import triton.runtime.interpreter as interpreter
    from triton.language.semantic import TritonSemantic

    builder = _builder_class(interpreter)()
    interpreter.interpreter_builder = builder
    interpreter.interpreter_semantic = TritonSemantic(builder)
    _accept_one_element_arrays(interpreter)


def _accept_one_element_arrays(interpreter: Any) -> None:
    """Loop bounds are one-element arrays, which numpy 2.4 no longer turns into integers by itself."""
    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda value: int(value.handle.data.reshape(-1)[0]))

    interpreter._patch_lang_tensor = patched


class _Storage:
    """Moves values between Triton's numpy storage and torch tensors of the real dtype."""

    def __init__(self) -> None:
        import triton.language as tl

        self.torch_of = {
            tl.float64: torch.float64,
            tl.float32: torch.float32,
            tl.float16: torch.float16,
            tl.bfloat16: torch.bfloat16,
            tl.float8e4nv: torch.float8_e4m3fn,
            tl.float8e5: torch.float8_e5m2,
        }

    def knows(self, *types: Any) -> bool:
        return all(t in self.torch_of for t in types)

    def convert(self, data: np.ndarray[Any, Any], source: Any, target: Any) -> np.ndarray[Any, Any]:
        """`data` of Triton type `source`, rounded to nearest even in the storage of `target`; e4m3 saturates."""
        import numpy as np

        flat = np.ascontiguousarray(data).reshape(-1)
        value = torch.from_numpy(flat.view(np.uint8).copy()).view(self.torch_of[source])
        if str(target) == "fp8e4nv":
            value = value.float().clamp(-448.0, 448.0)
        rounded = value.to(self.torch_of[target])
        raw = rounded.view(torch.uint8).numpy().view(f"u{rounded.element_size()}")
        kind = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}.get(str(target))
        out: np.ndarray[Any, Any] = (raw if kind is None else raw.view(kind)).reshape(data.shape)
        return out


def _builder_class(interpreter: Any) -> Any:
    import numpy as np
    import triton.language as tl

    handle, storage = interpreter.TensorHandle, _Storage()
    original = interpreter._convert_float

    def convert_float(data: Any, source: Any, target: Any, mode: Any) -> Any:
        nearest = mode is None or "RTNE" in str(mode)
        if nearest and storage.knows(source, target):
            return storage.convert(data, source, target)
        return original(data, source, target, mode)

    interpreter._convert_float = convert_float

    def narrow(value: Any) -> bool:
        return isinstance(value, handle) and value.dtype.scalar == tl.bfloat16

    def widen(value: Any) -> Any:
        return handle(storage.convert(value.data, tl.bfloat16, tl.float32), tl.float32) if narrow(value) else value

    def rounded(result: Any) -> Any:
        """A float32 result back as bfloat16; truth values of comparisons stay."""
        if result.data.dtype != np.float32:
            return result
        return handle(storage.convert(result.data, tl.float32, tl.bfloat16), tl.bfloat16)

    class Builder(interpreter.InterpreterBuilder):  # type: ignore[misc]
        def cast_impl(self, src: Any, dst_type: Any) -> Any:
            source, target = src.dtype.scalar, dst_type.scalar
            if source == target or tl.bfloat16 not in (source, target):
                return super().cast_impl(src, dst_type)
            if source == tl.bfloat16:
                wide = widen(src)
                return wide if target == tl.float32 else super().cast_impl(wide, dst_type)
            wide = src.data.astype(np.float32)
            return handle(storage.convert(wide, tl.float32, tl.bfloat16), tl.bfloat16)

        def create_dot(self, a: Any, b: Any, d: Any, *rest: Any) -> Any:
            return super().create_dot(widen(a), widen(b), d, *rest)

    def computed_wide(name: str) -> Any:
        plain = getattr(interpreter.InterpreterBuilder, name)

        def method(self: Any, *operands: Any) -> Any:
            if not any(narrow(o) for o in operands):
                return plain(self, *operands)
            return rounded(plain(self, *[widen(o) for o in operands]))

        return method

    for name in ("unary_op", "binary_op", "ternary_op", "create_fma", "create_erf", "create_rsqrt"):
        setattr(Builder, name, computed_wide(name))
    return Builder


def main(folder: Path) -> None:
    """Run the calls stored in `folder` and store their outputs (or tracebacks) there."""
    install()
    results: list[torch.Tensor | str] = []
    for i, plain in enumerate(torch.load(folder / "calls.pt", weights_only=True)):
        try:
            results.append(_run_call(plain, folder / f"module{i}.py"))
        except Exception:  # reported to the caller, who knows the call
            results.append(traceback.format_exc()[-3000:])
    torch.save(results, folder / "outs.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
