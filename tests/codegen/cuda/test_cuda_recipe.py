"""Decode sequences: exact for every code of every element, within the instructions they are meant to take."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from lowbit.codegen.cuda.bits import NarrowType, Op, Sequence, Type16, half_of, run, run_words, text, to_bits
from lowbit.codegen.cuda.recipe import Recipe, _proven, find_recipe
from lowbit.codegen.cuda.recipe_bytes import find_byte_recipe
from lowbit.codegen.cuda.value import read_value
from lowbit.compiler.ir.layout import LAYOUTS, plane_bits
from lowbit.compiler.ir.program import program
from lowbit.quantizers.formats import Element, FloatElement, LevelElement, catalog, scalar_format

ELEMENTS = [e for e in dict.fromkeys(f.element for f in catalog()) if e.name != "nf4"]
TYPES: tuple[Type16, ...] = ("f16", "bf16")


def decode_tile(recipe: Recipe, element: Element, codes: torch.Tensor) -> torch.Tensor:
    """float64 values of a 64 x 64 tile of codes, every lane running the sequence on its own words. Which register holds
    what is written down here from the PTX manual, not taken from the generator."""
    planes = LAYOUTS["fragments"].pack(codes, element.bits)
    values = torch.full((64, 64), float("nan"), dtype=torch.float64)
    table = torch.tensor(recipe.table, dtype=torch.float64) if recipe.table else None
    for part in range(4):
        words = {}
        for p, (width, plane) in enumerate(zip(plane_bits(element.bits), planes, strict=True)):
            lanes = plane.reshape(4, 32, width)[part].to(torch.int64) & 0xFFFFFFFF
            words |= {f"w{p}[{i}]": lanes[:, i] for i in range(width)}
        found = run(recipe.sequence, words, recipe.dtype, table)
        lane = torch.arange(32)
        for step, register, e in product(range(4), range(4), range(2)):
            row = part * 16 + lane // 4 + register % 2 * 8
            col = step * 16 + register // 2 * 8 + lane % 4 * 2 + e
            d = found[f"a[{step}][{register}]"][e]
            values[row, col] = d * recipe.factor + recipe.addend[register % 2]
    return values


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: f"{e.name}{'' if e.symmetric else 'a'}")
def test_every_code_in_every_place(element: Element, dtype: Type16) -> None:
    recipe = find_recipe(element, dtype)
    assert recipe is not None
    levels = element.levels().double()
    rng = torch.Generator().manual_seed(1)
    for shift in range(max(1, 2**element.bits // 64)):  # so that all codes come to all places of a word
        codes = (torch.arange(64 * 64).reshape(64, 64) * 37 + shift * 64) % 2**element.bits
        codes = codes[torch.randperm(64, generator=rng)].to(torch.uint8)
        got, want = decode_tile(recipe, element, codes), levels[codes.long()]
        assert torch.equal(got[want.isfinite()], want[want.isfinite()])


LIMITS = {("int4", "f16"): 0.75, ("int4", "bf16"): 1.0, ("int2", "f16"): 0.75, ("int2", "bf16"): 0.75,
          ("int8", "f16"): 0.5, ("int8", "bf16"): 1.0, ("int3", "bf16"): 1.5, ("e3m2", "f16"): 1.75,
          ("e2m1", "f16"): 1.5, ("e3m2", "bf16"): 3.0, ("e2m3", "bf16"): 2.25, ("e4m3", "bf16"): 2.25}  # fmt: skip


@pytest.mark.parametrize(("name", "dtype"), LIMITS)
def test_instructions_a_weight(name: str, dtype: Type16) -> None:
    recipe = find_recipe(scalar_format(f"{name}.ch").element, dtype)
    assert recipe is not None
    assert recipe.cost <= LIMITS[name, dtype]


BYTES = [("s8", scalar_format(f"int{b}.ch.{s}").element) for b in range(1, 9) for s in ("sym", "asym")]
BYTES += [("e4m3", scalar_format(f"{e}.ch").element) for e in ("e3m2", "e2m3", "e2m1", "e4m3", "e3m3", "e2m2")]


@pytest.mark.parametrize(
    ("operand", "element"), BYTES, ids=lambda x: x if isinstance(x, str) else f"{x.name}{x.symmetric}"
)
def test_bytes_in_every_place(operand: NarrowType, element: Element) -> None:
    """Byte i of lane t's register for the first half of 32 columns is column 4t + i of the instruction's operand; that
    is the matrix's column 8 (i % 2) + 2 t + i // 2, as `prepare` stores activations."""
    recipe = find_byte_recipe(element, operand)
    assert recipe is not None
    codes = torch.randint(0, 2**element.bits, (16, 64), generator=torch.Generator().manual_seed(element.bits))
    planes = LAYOUTS["fragments"].pack(codes.repeat(4, 1).to(torch.uint8), element.bits)
    words = {
        f"w{p}[{i}]": plane.reshape(4, 32, width)[0, :, i].to(torch.int64) & 0xFFFFFFFF
        for p, (width, plane) in enumerate(zip(plane_bits(element.bits), planes, strict=True))
        for i in range(width)
    }
    found, lane = run_words(recipe.sequence, words), torch.arange(32)
    for step, q, h, i in product(range(2), range(2), range(2), range(4)):
        byte = (found[f"a[{step}][{2 * q + h}]"] >> 8 * i & 255).to(torch.uint8)
        got = (
            byte.view(torch.int8 if operand == "s8" else torch.float8_e4m3fn).double() * recipe.factor
            + recipe.addend[0]
        )
        column = step * 32 + q * 16 + i % 2 * 8 + lane % 4 * 2 + i // 2
        want = element.levels().double()[codes[h * 8 + lane // 4, column]]
        assert torch.equal(got[want.isfinite()], want[want.isfinite()])


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_nibbles_in_every_place(bits: int) -> None:
    """Nibble i of lane t's register for the first half of 64 columns is column 8t + i of the instruction's operand:
    the matrix's column 16 (i % 2) + 8 (i // 2 % 2) + 2 t + i // 4, as `prepare` stores activations."""
    element = scalar_format(f"int{bits}.ch.sym").element
    recipe = find_byte_recipe(element, "s4")
    assert recipe is not None
    assert recipe.cost <= {1: 0.5, 2: 0.3125, 3: 0.875, 4: 0.375}[bits]
    codes = torch.randint(0, 2**bits, (16, 64), generator=torch.Generator().manual_seed(bits))
    planes = LAYOUTS["fragments"].pack(codes.repeat(4, 1).to(torch.uint8), bits)
    words = {
        f"w{p}[{i}]": plane.reshape(4, 32, width)[0, :, i].to(torch.int64) & 0xFFFFFFFF
        for p, (width, plane) in enumerate(zip(plane_bits(bits), planes, strict=True))
        for i in range(width)
    }
    found, lane = run_words(recipe.sequence, words), torch.arange(32)
    for q, h, i in product(range(2), range(2), range(8)):
        half = found[f"a[0][{2 * q + h}]"] >> 4 * i & 15
        got = (half - 16 * (half > 7)) * recipe.factor + recipe.addend[0]
        column = q * 32 + i % 2 * 16 + i // 2 % 2 * 8 + lane % 4 * 2 + i // 4
        assert torch.equal(got, element.levels().double()[codes[h * 8 + lane // 4, column]])


def test_bytes_cost_little() -> None:
    """Symmetric integers need no sums of activations; four codes take one or two instructions."""
    for bits, limit in ((8, 0.25), (4, 0.375), (2, 0.4375)):
        recipe = find_byte_recipe(scalar_format(f"int{bits}.ch.sym").element, "s8")
        assert recipe is not None
        assert not recipe.sums_activations
        assert recipe.cost <= limit
    assert find_byte_recipe(scalar_format("int8.ch.asym").element, "s8", plain=True) is None
    assert find_byte_recipe(scalar_format("e5m2.ch").element, "e4m3") is None


@pytest.mark.parametrize(("exponent", "mantissa"), [(1, 0), (2, 4), (3, 3), (4, 2), (1, 6), (5, 1)])
def test_other_floats_have_both_types(exponent: int, mantissa: int) -> None:
    for dtype in TYPES:
        assert find_recipe(FloatElement(exponent, mantissa), dtype) is not None


def test_what_is_not_exact_has_no_recipe() -> None:
    assert find_recipe(FloatElement(6, 1), "f16") is None  # exponents beyond float16's
    assert find_recipe(LevelElement("third", (0.0, 1 / 3)), "bf16") is None
    assert find_recipe(scalar_format("nf4.g64").element, "f16") is None
    assert find_recipe(LevelElement("pot", (0.0, 1.0, 2.0, -4.0)), "bf16") is not None


def test_a_wrong_sequence_is_not_proven() -> None:
    element = scalar_format("int4.ch.sym").element
    recipe = find_recipe(element, "f16")
    assert recipe is not None
    assert _proven(recipe, element)
    for i, op in enumerate(recipe.sequence.ops):
        if op.name == "andor":
            broken = Op(op.name, (op.args[0], int(op.args[1]) ^ 1 << 16, *op.args[2:]))
            ops = {broken if j == i else o: name for j, (o, name) in enumerate(recipe.sequence.ops.items())}
            assert not _proven(replace(recipe, sequence=Sequence(ops, recipe.sequence.outputs)), element)
    assert not _proven(replace(recipe, addend=(recipe.addend[0], recipe.addend[0])), element)


def test_programs_that_cannot_be_read_are_refused() -> None:
    with program("code") as p:
        p.result(p.int_to_float(p.shr(p.arg("code"), p.arg("code"))))
    assert read_value(p.done(), 4) is None


def test_numbers_outside_the_type_are_refused() -> None:
    assert half_of(1.0, "f16") == 0x3C00
    with pytest.raises(ValueError, match="no bf16"):
        half_of(257.0, "bf16")
    assert to_bits(torch.tensor([2.0**-133], dtype=torch.float64), "bf16").tolist() == [1]


def test_text_names_every_operation() -> None:
    s = Sequence()
    s.outputs["y"] = s.add("andor", s.shift(s.shift("w", 4), -2), 0x000F000F, 0x64006400)
    assert text(s) == ["const uint32_t t0 = w >> 4;", "const uint32_t t1 = t0 << 2;",
                       "const uint32_t t2 = band_or(t1, 0xf000fu, 0x64006400u);", "y = t2;"]  # fmt: skip


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("element", [e for e in ELEMENTS if not e.symmetric or e.integer], ids=lambda e: e.name)
def test_addends_and_zero_points_are_numbers_of_the_type(element: Element, dtype: Type16) -> None:
    """Kernels for many tokens add them to the operands, which is exact only then."""
    recipe = find_recipe(element, dtype)
    assert recipe is not None
    for zero in range(1 if element.symmetric else 2**element.bits):
        for addend in recipe.addend:
            half_of((addend - zero) / recipe.factor, dtype)


def _truncate(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Toward zero to 24 bits below the largest magnitude in a row of `like`."""
    unit = torch.exp2(torch.floor(torch.log2(like.abs().amax(1, keepdim=True).clamp(min=1e-30))) - 23)
    return torch.trunc(values / unit) * unit


@pytest.mark.parametrize(("dtype", "limit"), [("f16", 1e-4), ("bf16", 1e-5)])
def test_addends_in_sums_cost_little_accuracy(dtype: Type16, limit: float) -> None:
    """4-bit integers ride on their addend through matrix units that truncate sums to 24 bits after every 16 columns, as
    "Numerical behavior of NVIDIA tensor cores" (Fasi et al.) finds at worst; scaled and added up every 128 columns."""
    recipe = find_recipe(scalar_format("int4.ch.sym").element, dtype)
    assert recipe is not None
    rng, shape = torch.Generator().manual_seed(0), (64, 4096)
    codes = torch.randint(0, 16, shape, generator=rng).double()
    x = torch.randn(shape[1], generator=rng).to(torch.float16 if dtype == "f16" else torch.bfloat16).double()
    top = max(map(abs, recipe.addend)) - 8  # what the register holds beyond the code
    y = torch.zeros(shape[0], 1, dtype=torch.float64)
    for start in range(0, shape[1], 128):
        sums = [torch.zeros(shape[0], 1, dtype=torch.float64) for _ in range(2)]
        for s in range(start, start + 128, 16):
            for i, left in enumerate((codes[:, s : s + 16] + top, torch.ones(shape[0], 16, dtype=torch.float64))):
                terms = torch.cat([left * x[s : s + 16], sums[i]], 1)
                total = _truncate(terms, terms).sum(1, keepdim=True)
                sums[i] = _truncate(total, total)
        y = (y + sums[0] - (top + 8) * sums[1]).float().double()
    want = (codes - 8) @ x
    assert float((y[:, 0] - want).norm() / want.norm()) <= limit
