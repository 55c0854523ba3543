"""The torch operators behind a packed key-value cache: `lowbit::append_kv`, `lowbit::attend_kv`, `lowbit::read_kv`.

How many tokens a cache holds is a tensor, read inside the operators, so that torch.compile sees the same graph for
every step. On CPUs generated C++ runs them. On NVIDIA GPUs a generated Triton kernel attends, and torch appends.
Without a compiler, on other devices and for GEAR's correction torch does both (`codegen.reference.kvstate`).
"""

from __future__ import annotations

import threading
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from lowbit.codegen.attend import AttendSpec, parse_attend_spec
from lowbit.codegen.cpp.attend import attend_source
from lowbit.codegen.cpp.attend_launch import AttendKernel, load_attend
from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.codegen.reference.kvstate import KVState, allocate
from lowbit.codegen.reference.kvstate import attend as reference_attend
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.select import say_once
from lowbit.codegen.triton.attend import attend_source as triton_source
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.target import Target, host_target
from lowbit.compiler.runtime import prebuilt
from lowbit.compiler.runtime.cache import KernelCache
from lowbit.compiler.runtime.native import build_native
from lowbit.compiler.runtime.ops import LIBRARY
from lowbit.quantizers.hadamard import hadamard, rotate

__all__ = ["TOLERANCE", "attend_kernel", "build_attend", "check_attend", "gpu_attend_kernel"]

TOLERANCE = 5e-4
"""Largest allowed root-mean-square error relative to the reference's."""

_lock = threading.Lock()


@cache
def attend_kernel(key: str) -> AttendKernel | None:
    """This machine's kernel for a spec, built on first use; None where torch must do: no compiler, or a correction.

    Keys and queries are rotated by its callers.
    """
    spec = parse_attend_spec(key)
    if spec.fmt.gear is not None:
        return None
    if spec.fmt.rotate:
        return attend_kernel(spec.unrotated.key())
    shipped = prebuilt.prebuilt_file(spec.key(), host_target(), lambda target: attend_source(spec, target.arch))
    if shipped is not None:
        return load_attend(shipped, spec)
    if find_compiler() is None:
        if prebuilt.frozen():
            raise prebuilt.missing_kernel(_named(spec), host_target())
        say_once(f"attention over {spec.format} runs on torch: correct, but slow; no C++ compiler was found")
        return None
    with _lock:
        return build_attend(spec, host_target(), KernelCache())


@cache
def gpu_attend_kernel(key: str, device: torch.device) -> AttendKernel | None:
    """The same for an NVIDIA GPU: attention by Triton, appending by torch. None where torch must do both."""
    spec = parse_attend_spec(key)
    if spec.fmt.gear is not None:
        return None
    if spec.fmt.rotate:
        return gpu_attend_kernel(spec.unrotated.key(), device)
    major, minor = torch.cuda.get_device_capability(device)
    if find_spec("triton") is None or major < 8:
        why = "triton is not installed" if major >= 8 else "it is older than sm_80"
        say_once(f"attention over {spec.format} runs on torch on this GPU: correct, but slow; {why}")
        return None
    with _lock, torch.cuda.device(device):
        return _build_gpu(spec, Target("cuda", f"sm_{major}{minor}"), device)


def _build_gpu(spec: AttendSpec, target: Target, device: torch.device) -> AttendKernel:
    from lowbit.codegen.triton.attend_launch import load_attend as load  # Triton is imported when it is needed

    store, source, toolchain = KernelCache(), triton_source(spec), f"triton {version('triton')}"
    key = store.key(spec, Schedule(), target, source, toolchain)

    def loaded(artifact: Path) -> AttendKernel:
        return AttendKernel(lambda k, v, state, n: KVState.of(spec, state).append(k, v, n), load(artifact, spec))

    def build(artifact: Path) -> None:
        artifact.write_text(source.text)
        check_attend(spec, loaded(artifact), device=device)

    evidence = {"spec": spec.key(), "target": str(target), "backend": "triton", "toolchain": toolchain}
    found = store.lookup(key)
    return loaded(found[0] if found else store.store(key, source.suffix, evidence, build))


def build_attend(spec: AttendSpec, target: Target, cache_: KernelCache) -> AttendKernel:
    """Compile, check and store the kernel, or load it from the cache. Raises KernelError (LB04xx)."""
    return build_native(
        spec,
        attend_source(spec, target.arch),
        target,
        cache_,
        lambda artifact: load_attend(artifact, spec),
        lambda kernel: check_attend(spec, kernel),
        _named(spec),
    )


def _named(spec: AttendSpec) -> str:
    return f"attention over {spec.format} with heads of {spec.head_dim}"


def check_attend(spec: AttendSpec, kernel: AttendKernel, tokens: int = 0, device: torch.device | None = None) -> float:
    """Relative error of `kernel` on random data, for codes must be the reference's to the bit; raises KernelError
    (LB0408) beyond tolerance. tokens: cached; a bit more than two groups and windows by default."""
    tokens, rng = tokens or 2 * spec.span + 37, torch.Generator().manual_seed(1)
    keys, values = (torch.randn(1, 2, tokens, spec.head_dim, generator=rng).to(device) for _ in "kv")
    want, got = (allocate(spec, 1, 2, 3 * spec.span, keys.device) for _ in "wg")
    state = KVState(spec, want)
    for start, stop in ((0, tokens - 3), (tokens - 3, tokens)):
        state.append(keys[:, :, start:stop], values[:, :, start:stop], start)
        kernel.append(keys[:, :, start:stop], values[:, :, start:stop], list(got.values()), start)
    different = [name for name in want if "window" not in name and not torch.equal(want[name], got[name])]
    # Of windows only what is still in them: rows of tokens that have left are never read again.
    pairs = zip("kv", state.read(tokens), KVState(spec, got).read(tokens), strict=True)
    different += [letter for letter, a, b in pairs if not torch.equal(a, b)]
    if different:
        raise KernelError("LB0408", f"kernel disagrees with the reference: {', '.join(different)} differ")
    q, scale = torch.randn(1, 6, 3, spec.head_dim, generator=rng).to(device), spec.head_dim**-0.5
    exact = reference_attend(q, state, tokens, None, scale)
    difference = kernel.attend(q, list(got.values()), tokens, None, scale) - exact
    error = float(difference.square().mean().sqrt() / exact.square().mean().sqrt())
    if not error <= TOLERANCE:
        raise KernelError(
            "LB0408", f"kernel disagrees with the reference: relative error {error:.2g} > {TOLERANCE:.2g}"
        )
    return error


def _kernel(key: str, device: torch.device) -> AttendKernel | None:
    if device.type == "cuda" and torch.version.hip is None:
        return gpu_attend_kernel(key, device)
    return attend_kernel(key) if device.type == "cpu" else None


def _append(keys: Tensor, values: Tensor, state: list[Tensor], length: Tensor, limit: int, spec: str) -> None:
    parsed, start = parse_attend_spec(spec), int(length)
    if start + keys.shape[2] > limit:
        raise KernelError(
            "LB0426",
            f"{keys.shape[2]} tokens do not fit behind {start} in a cache for {limit}",
            hint="make the cache with a larger max_tokens",
        )
    keys = rotate(keys.float(), parsed.head_dim) if parsed.fmt.rotate else keys.float()
    if (kernel := _kernel(spec, keys.device)) is not None:
        kernel.append(keys, values.float(), state, start)
    else:
        KVState.of(parsed, state).append(keys, values, start)


def _attend(q: Tensor, state: list[Tensor], length: Tensor, mask: Tensor | None, scale: float, spec: str) -> Tensor:
    parsed, tokens = parse_attend_spec(spec), int(length)
    wide = rotate(q.float(), parsed.head_dim) if parsed.fmt.rotate else q.float()
    if (kernel := _kernel(spec, q.device)) is not None:
        return kernel.attend(wide, state, tokens, mask, scale).to(q.dtype)
    return reference_attend(wide, KVState.of(parsed, state), tokens, mask, scale).to(q.dtype)


def _read(state: list[Tensor], length: Tensor, tokens: int, spec: str) -> tuple[Tensor, Tensor]:
    parsed, filled = parse_attend_spec(spec), int(length)
    keys, values = KVState.of(parsed, state).read(filled)
    if parsed.fmt.rotate:  # rotated rows times the matrix itself: the inverse
        keys = keys @ hadamard(parsed.head_dim).to(keys.device) * parsed.head_dim**-0.5
    out = [t.new_zeros(*t.shape[:2], tokens, t.shape[3]) for t in (keys, values)]
    for to, part in zip(out, (keys, values), strict=True):
        to[:, :, :filled] = part
    return out[0], out[1]


def _append_fake(keys: Tensor, values: Tensor, state: list[Tensor], length: Tensor, limit: int, spec: str) -> None:
    torch._check(keys.shape == values.shape, lambda: f"keys are {keys.shape}, values {values.shape}")


def _attend_fake(
    q: Tensor, state: list[Tensor], length: Tensor, mask: Tensor | None, scale: float, spec: str
) -> Tensor:
    return q.new_empty(q.shape)


def _read_fake(state: list[Tensor], length: Tensor, tokens: int, spec: str) -> tuple[Tensor, Tensor]:
    shape = (*state[0].shape[:2], tokens, parse_attend_spec(spec).head_dim)
    return state[0].new_empty(shape, dtype=torch.float32), state[0].new_empty(shape, dtype=torch.float32)


_TAGS = (torch.Tag.pt2_compliant_tag,)
LIBRARY.define(
    "append_kv(Tensor keys, Tensor values, Tensor(a!)[] state, Tensor length, int limit, str spec) -> ()", tags=_TAGS
)
LIBRARY.define(
    "attend_kv(Tensor q, Tensor[] state, Tensor length, Tensor? mask, float scale, str spec) -> Tensor", tags=_TAGS
)
LIBRARY.define("read_kv(Tensor[] state, Tensor length, int tokens, str spec) -> (Tensor, Tensor)", tags=_TAGS)
for _name, _function, _fake in (
    ("append_kv", _append, _append_fake),
    ("attend_kv", _attend, _attend_fake),
    ("read_kv", _read, _read_fake),
):
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _function, _key)
    torch.library.register_fake(f"lowbit::{_name}", _fake, lib=LIBRARY)
