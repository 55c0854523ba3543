"""What all generated kernels share: which output tile a program computes, split-K, and the epilogue.

Split-K is finished in the same launch: programs leave partial sums, and the last one to arrive at an output tile adds
them in a fixed order, so results do not depend on timing.
"""

from __future__ import annotations

from typing import Protocol

from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec

__all__ = ["BODY", "LOOP", "TRITON_TYPES", "Grid", "finish", "loop", "module", "order", "output_args", "split"]

BODY, LOOP = "    ", "        "

TRITON_TYPES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
"""dtype of a spec -> Triton's signature name."""


class Grid(Protocol):
    """What the shared parts need to know of a kernel: its output tiles and its steps along K.

    Sources index output columns with `n_<a>` / `n_<a>_ok` (a = accumulator: 1 is the `up` half of a gated MLP).
    """

    @property
    def spec(self) -> KernelSpec: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def accumulators(self) -> tuple[int, ...]:
        """Output tiles held at once."""

    @property
    def n_acc(self) -> int:
        """Columns of the output."""

    @property
    def n_tiles(self) -> int:
        """Tiles that cover the output's columns."""

    @property
    def steps(self) -> int:
        """Steps that cover the columns of the packed matrix."""


def output_args(spec: KernelSpec, schedule: Schedule) -> dict[str, str]:
    """Parameter name -> Triton type of what follows the weight's operands."""
    args = {"bias_ptr": "*fp32"} if "bias" in spec.epilogue else {}
    if "residual" in spec.epilogue:
        args["residual_ptr"] = f"*{TRITON_TYPES[spec.out_dtype]}"
    args["out_ptr"] = f"*{TRITON_TYPES[spec.out_dtype]}"
    if schedule.split_k > 1:
        args |= {"part_ptr": "*fp32", "count_ptr": "*i32"}
    return {**args, "tokens": "i32"}


def module(t: Grid, args: dict[str, str], body: list[str], extra: dict[str, str], before: list[str]) -> str:
    """A module's source: `kernel`, and where `extra` names parameters `prepare`, which runs first and makes the
    activations ready; for each the Triton types of its parameters and its options."""
    spec, schedule = t.spec, t.schedule
    head = [
        f'"""Generated kernel {spec.digest()}: {spec.format}, {spec.compute} products."""',
        "import triton",
        "import triton.language as tl",
        f"ARGS = {args!r}",
        f"PREPARE_ARGS = {extra!r}",
        f"OPTIONS = {{'num_warps': {schedule.warps}, 'num_stages': {schedule.stages}, 'enable_fp_fusion': True}}",
        # Rounding must not be fused with what comes before: it would round something else.
        f"PREPARE_OPTIONS = {{'num_warps': {1 if spec.vector else 4}, 'enable_fp_fusion': {bool(spec.vector)}}}",
    ]
    text = [*head, *_function("kernel", args, body), *(_function("prepare", extra, before) if extra else [])]
    return "\n".join(text) + "\n"


def _function(name: str, args: dict[str, str], body: list[str]) -> list[str]:
    # One compilation serves every token count: nothing is specialised on it.
    return ["", "", '@triton.jit(do_not_specialize=["tokens"])', f"def {name}({', '.join(args)}):", *body]


def order(t: Grid) -> list[str]:
    """Which output tile this program computes; neighbouring programs share weights through L2."""
    n_tiles = t.n_tiles
    lines = [
        "program = tl.program_id(0)",
        f"m_tiles = tl.cdiv(tokens, {t.schedule.tile_m})",
        # Groups of 8 token tiles walk the weight tiles together, so a weight tile is read from memory once a group.
        f"band = program // (8 * {n_tiles})",
        "band_m = tl.minimum(m_tiles - band * 8, 8)",
        f"inside = program - band * (8 * {n_tiles})",
        "m_tile = band * 8 + inside % band_m",
        "n_tile = inside // band_m",
    ]
    return [BODY + line for line in lines]


def split(t: Grid) -> list[str]:
    """The steps this program adds up, `first` to `last`."""
    if t.schedule.split_k == 1:
        return [f"{BODY}first, last = 0, {t.steps}"]
    per = -(-t.steps // t.schedule.split_k)
    lines = ["part = tl.program_id(1)", f"first = part * {per}", f"last = tl.minimum(first + {per}, {t.steps})"]
    return [BODY + line for line in lines]


def loop(t: Grid) -> str:
    """The head of the main loop."""
    bounds = "first, last" if t.schedule.split_k > 1 else f"0, {t.steps}"
    return f"{BODY}for step in range({bounds}):"


def _pieces(t: Grid) -> list[tuple[str, str]]:
    """(suffix of accumulators, statement that sets row numbers `m` and `m_ok`) of each part of the output tile."""
    if not t.schedule.get("gemv", 0):
        return [("", "")]
    return [(f"_{i}", f"m = m_{i} + tl.arange(0, 1)") for i in range(t.schedule.tile_m)]


def finish(t: Grid) -> list[str]:
    """From accumulators `acc_<a>` (`acc_<a>_<i>` without matrix instructions) to the stored output."""
    lines: list[str] = []
    if t.schedule.split_k == 1:
        for suffix, rows in _pieces(t):
            lines += _epilogue(t, suffix, rows, BODY)
        return lines
    n, parts = t.n_acc, t.schedule.split_k
    for suffix, rows in _pieces(t):
        lines += _rows(rows, BODY)
        for a in t.accumulators:
            at = f"((part * {len(t.accumulators)} + {a}) * tokens + m).to(tl.int64)[:, None] * {n} + n_0[None, :]"
            lines.append(f"{BODY}tl.store(part_ptr + {at}, acc_{a}{suffix}, mask={_out_mask()})")
    lines += [
        f"{BODY}tl.debug_barrier()",  # every thread's stores come before the arrival is counted
        f'{BODY}arrived = tl.atomic_add(count_ptr + program, 1, sem="acq_rel")',
        f"{BODY}if arrived == {parts - 1}:",
        f"{LOOP}tl.store(count_ptr + program, 0)",
    ]
    for suffix, rows in _pieces(t):
        lines += _rows(rows, LOOP)
        for a in t.accumulators:
            lines.append(f"{LOOP}acc_{a}{suffix} = tl.zeros_like(acc_{a}{suffix})")
        lines.append(f"{LOOP}for other in range({parts}):")
        for a in t.accumulators:
            at = f"((other * {len(t.accumulators)} + {a}) * tokens + m).to(tl.int64)[:, None] * {n} + n_0[None, :]"
            load = f'tl.load(part_ptr + {at}, mask={_out_mask()}, other=0.0, cache_modifier=".cg")'
            lines.append(f"{LOOP}    acc_{a}{suffix} += {load}")
        lines += _epilogue(t, suffix, rows, LOOP)
    return lines


def _out_mask() -> str:
    return "m_ok[:, None] & n_0_ok[None, :]"


def _rows(rows: str, pad: str) -> list[str]:
    return [pad + rows, f"{pad}m_ok = m < tokens"] if rows else []


def _epilogue(t: Grid, suffix: str, rows: str, pad: str) -> list[str]:
    """The spec's epilogue in its order, then the store."""
    live = list(t.accumulators)
    lines = _rows(rows, pad)
    out_at = f"m.to(tl.int64)[:, None] * {t.n_acc} + n_0[None, :]"
    for step in t.spec.epilogue:
        if step == "bias":
            for a in live:
                load = f"tl.load(bias_ptr + n_{a}, mask=n_0_ok, other=0.0)[None, :]"
                lines.append(f"{pad}acc_{a}{suffix} += {load}")
        elif step == "silu_mul":
            gate, up = f"acc_0{suffix}", f"acc_1{suffix}"
            lines.append(f"{pad}{gate} = {gate} / (1.0 + tl.exp(-{gate})) * {up}")
            live = [0]
        else:
            load = f"tl.load(residual_ptr + {out_at}, mask={_out_mask()}, other=0.0).to(tl.float32)"
            lines.append(f"{pad}acc_0{suffix} += {load}")
    cast = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}[t.spec.out_dtype]
    lines.append(f"{pad}tl.store(out_ptr + {out_at}, acc_0{suffix}.to(tl.{cast}), mask={_out_mask()})")
    return lines
