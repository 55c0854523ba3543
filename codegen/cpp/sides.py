"""Text that both kernel shapes share: pointers, scales and zero points, sums to floats, and the call of a tile."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lowbit.codegen.cpp.plan import Plan

__all__ = [
    "decode_sides",
    "dispatch",
    "fetched",
    "indent",
    "panel_of",
    "part_group",
    "pointers",
    "scale_and_zero",
    "side_loads",
    "side_prefetch",
    "slots_of",
    "start_value",
    "units",
]


def indent(lines: list[str]) -> str:
    """Lines joined, indented by the braces they open and close."""
    out, depth = [], 0
    for line in lines:
        depth -= line.startswith("}")
        out.append("  " * depth + line)
        depth += line.endswith("{")
    return "\n".join(out) + "\n"


def panel_of(plan: Plan, width: int, i: int) -> str:
    """The packed panel behind panel `i` of a tile of `width`: gate panels first, then up panels, half a matrix on."""
    if plan.silu and i >= width // 2:
        return f"kSlots + slot + {i - width // 2}"
    return f"slot + {i}"


def units(plan: Plan, width: int) -> list[str]:
    """Declarations of `u<panel>`: what the panel's scales are multiplied with (see `load_scale`)."""
    return [f"[[maybe_unused]] const F u{i} = unit_of(a, {panel_of(plan, width, i)});" for i in range(width)]


def pointers(plan: Plan, width: int, block: str = "0") -> list[str]:
    """Declarations of `p<panel>w<plane>`, at packed block `block` of each panel of the tile."""
    return [
        f"const uint8_t* p{i}w{j} = a.plane[{j}] + (({panel_of(plan, width, i)}) * kBlocks + {block}) * {64 * bits};"
        for i in range(width)
        for j, bits in enumerate(plan.planes)
    ]


def side_loads(plan: Plan, panel: str, i: int, group: str) -> dict[str, tuple[str, str]]:
    """Type and value of `s` (scales of 16 rows), and of `z` or `o` where zero points or offsets are stored.

    panel: the packed panel, an expression; i: its number in the tile.
    """
    at = f"(({panel}) * kGroups + {group}) * 16"
    out = {"s": ("F", f"load_scale((const ST*)a.scale + {at}, u{i})")}
    if plan.spec.fmt.zero:
        load = f"load_u8(a.zero + {at})"
        out["z"] = ("V", f"zero_pair({load})") if plan.integer else ("F", f"cvt({load})")
    if plan.spec.fmt.offset:
        out["o"] = ("F", f"load_side((const ST*)a.offset + {at})")
    return out


def scale_and_zero(plan: Plan, width: int, group: str, panels: Iterable[int] | None = None) -> list[str]:
    """Declarations of `s<panel>`, `z<panel>` and `o<panel>` (see `side_loads`) of all panels or of `panels`."""
    chosen = range(width) if panels is None else panels
    return [
        f"const {type_} {side}{i} = {value};"
        for i in chosen
        for side, (type_, value) in side_loads(plan, panel_of(plan, width, i), i, group).items()
    ]


def slots_of(plan: Plan, width: int) -> int:
    """Slots that a tile of `width` panels stands for."""
    return width // 2 if plan.silu else width


def fetched(plan: Plan, blocks: str = "") -> list[str]:
    """Fetches of the block that lies `Plan.ahead` blocks behind the one at `w<plane>`, and `blocks` more."""
    if not plan.ahead:
        return []
    vectors = [(j, bits, v) for j, bits in enumerate(plan.planes) for v in range(bits)]
    return [f"prefetch_far(w{j} + ({blocks}{plan.ahead}) * {64 * bits} + {64 * v});" for j, bits, v in vectors]


def side_prefetch(plan: Plan, width: int, i: int, group: str) -> list[str]:
    """Fetches what `scale_and_zero` loads for the same group of the tile's next unit: hardware follows the long streams
    of codes, but not the short ones beside them."""
    if not plan.ahead:
        return []
    at = f"(({panel_of(plan, width, i)} + {slots_of(plan, width)}) * kGroups + {group}) * 16"
    fmt = plan.spec.fmt
    out = [f"prefetch((const ST*)a.scale + {at});"]
    out += [f"prefetch(a.zero + {at});"] if fmt.zero else []
    return [*out, *([f"prefetch((const ST*)a.offset + {at});"] if fmt.offset else [])]


def part_group(plan: Plan, chunk: str, part: int) -> str:
    """The group of one part of a block. Parts after the last group have no scale and no activations: any will do."""
    group = f"{chunk} * kParts + {part}"
    return group if plan.spec.groups % plan.spec.parts == 0 else f"({group} < kGroups ? {group} : kGroups - 1)"


def decode_sides(plan: Plan, i: int) -> list[str]:
    """The names that the float decode program of panel `i` uses."""
    fmt = plan.spec.fmt
    sides = ["scale", *(["zero"] if fmt.zero else ["offset"] if fmt.offset else [])]
    return [f"const F {side} = {side[0]}{i};" for side in sides]


def start_value(plan: Plan, zero: str, word: str) -> str:
    """-(zero point or bias) * (sum of the chunk's activations), exact: see `zero_pair` and `round_chunk`."""
    return f"madd16({zero}, set1(uint32_t({word})))" if plan.spec.fmt.zero else f"set1(uint32_t({word}))"


def dispatch(heights: tuple[int, ...], first: str, last: str, call: Callable[[int], str]) -> list[str]:
    """A loop over tokens [first, last) that calls the largest tile that fits."""
    out = [f"for (int64_t t = {first}; t < {last};) {{"]
    for n, height in enumerate(heights):
        guard = f"if (t + {height} <= {last}) {{" if height > 1 else "{"
        out += [("else " if n else "") + guard, call(height), f"t += {height};", "}"]
    return [*out, "}"]
