"""What happens to a token's finished sums: bias, silu-mul, residual, and storing 16 outputs or as many as there are."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.codegen.tvm.plan import Plan
from lowbit.codegen.tvm.printing import LANES
from lowbit.codegen.tvm.sides import load

__all__ = ["finish"]


@dataclass(frozen=True)
class _Lanes:
    """How one statement sees outputs: 16 at once, or one of them, `lane`."""

    count: int

    def kind(self, name: str) -> str:
        return f"{name}x{self.count}" if self.count > 1 else name

    def at(self, buffer: str, start: str) -> str:
        return load(buffer, start) if self.count > 1 else f"{buffer}[{start} + lane]"

    def constant(self, text: str) -> str:
        return f"T.Broadcast({text}, {self.count})" if self.count > 1 else text

    def let(self, name: str, kind: str, text: str) -> str:
        return f"{name}: T.let[T.{self.kind(kind)}] = {text}"


def finish(plan: Plan, sums: list[str]) -> list[str]:
    """Statements for one token. sums: vectors of its sums, one of each panel of an output.

    Scope: `token`, its number; `column` and `rows`, see `sides.output_place`; buffers `tail0`, `tail1` of 16 numbers.
    """
    names = [f"sum{i}" for i in range(len(sums))]
    whole = _Lanes(LANES)
    lines = [whole.let(name, "float32", text) for name, text in zip(names, sums, strict=True)]
    lines += [f"if rows == {LANES}:", *_indent(_steps(plan, whole, names)), "else:"]
    ragged = [f"tail{i}[T.Ramp(0, 1, {LANES})] = {name}" for i, name in enumerate(names)]
    ragged.append("for lane in range(rows):")
    ragged += _indent(_steps(plan, _Lanes(1), [f"tail{i}[lane]" for i in range(len(sums))]))
    return [*lines, *_indent(ragged)]


def _indent(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]


def _steps(plan: Plan, lanes: _Lanes, values: list[str]) -> list[str]:
    """The epilogue's steps in order, and the store."""
    spec, tag = plan.spec, "w" if lanes.count > 1 else "r"
    lines = [f"place_{tag}: T.let[T.int32] = token * {spec.n_out} + column"]
    for turn, step in enumerate(spec.epilogue):
        if step == "bias":
            values = [
                f"({value} + {lanes.at('bias', f'(column + {i * spec.segments[0]})')})"
                for i, value in enumerate(values)
            ]
        elif step == "silu_mul":
            gate, up = values
            one, zero = lanes.constant("T.float32(1)"), lanes.constant("T.float32(0)")
            lines.append(lanes.let(f"gate_{tag}", "float32", gate))
            values = [f"(gate_{tag} / ({one} + T.exp({zero} - gate_{tag})) * {up})"]
        else:
            values = [f"({values[0]} + {_residual(plan, lanes, f'place_{tag}')})"]
        lines += [lanes.let(f"y{i}{turn}_{tag}", "float32", value) for i, value in enumerate(values)]
        values = [f"y{i}{turn}_{tag}" for i in range(len(values))]
    return [*lines, *_store(plan, lanes, values[0], tag)]


def _residual(plan: Plan, lanes: _Lanes, place: str) -> str:
    stored = lanes.at("residual", place)
    if plan.spec.out_dtype == "f32":
        return stored
    if plan.spec.out_dtype == "f16":
        return f'T.Cast("{lanes.kind("float32")}", {stored})'
    bits = f'T.shift_left(T.Cast("{lanes.kind("uint32")}", {stored}), {lanes.constant("T.uint32(16)")})'
    return f'T.reinterpret("{lanes.kind("float32")}", {bits})'


def _store(plan: Plan, lanes: _Lanes, value: str, tag: str) -> list[str]:
    target = lanes.at("out", f"place_{tag}")
    if plan.spec.out_dtype == "f32":
        return [f"{target} = {value}"]
    if plan.spec.out_dtype == "f16":
        return [f'{target} = T.Cast("{lanes.kind("float16")}", {value})']
    # To the nearest bfloat16, ties to even; what is no number stays none.
    sixteen, one, half = (lanes.constant(f"T.uint32({n})") for n in (16, 1, 0x7FFF))
    quiet = lanes.constant("T.uint32(0x7FC0)")
    odd = f"T.bitwise_and(T.shift_right(bits_{tag}, {sixteen}), {one})"
    return [
        lanes.let(f"y_{tag}", "float32", value),
        lanes.let(f"bits_{tag}", "uint32", f'T.reinterpret("{lanes.kind("uint32")}", y_{tag})'),
        lanes.let(f"near_{tag}", "uint32", f"T.shift_right(bits_{tag} + {half} + {odd}, {sixteen})"),
        lanes.let(f"kept_{tag}", "uint32", f"T.Select(y_{tag} == y_{tag}, near_{tag}, {quiet})"),
        f'{target} = T.Cast("{lanes.kind("uint16")}", kept_{tag})',
    ]
