"""Whether operands can be scaled where they are: in registers, in 16 bits."""

from __future__ import annotations

from functools import cache

import torch

from lowbit.codegen.cuda.bits import Type16, half_of, run, to_bits
from lowbit.codegen.cuda.recipe import find_recipe, trial_words
from lowbit.quantizers.formats import Element

__all__ = ["unscaled"]

_TORCH = {"f16": torch.float16, "bf16": torch.bfloat16}


@cache
def unscaled(element: Element, dtype: Type16) -> bool:
    """Whether one multiply-add in 16 bits, by a recipe's factor and addend, makes every code's own number of what the
    recipe leaves in a register. Scales can meet it there then. Codes for infinity and NaN aside."""
    recipe = find_recipe(element, dtype)
    if recipe is None:
        return False
    try:
        for constant in (recipe.factor, *recipe.addend):
            half_of(constant, dtype)
    except ValueError:
        return False
    lane, words = trial_words(element.bits)
    table = torch.tensor(recipe.table, dtype=torch.float64) if recipe.table else None
    found, levels = run(recipe.sequence, words, dtype, table), element.levels().double()
    for i in range(16):  # in the order of `trial_words`: two neighbouring columns in each register
        for e, got in enumerate(found[f"a[{i // 4}][{i % 4}]"]):
            value, want = _rounded(got * recipe.factor + recipe.addend[i % 2], dtype), levels[lane[:, 2 * i + e]]
            if not torch.equal(value[want.isfinite()], want[want.isfinite()]):
                return False
    return True


def _rounded(values: torch.Tensor, dtype: Type16) -> torch.Tensor:
    held = to_bits(values, dtype).to(torch.int32)
    return (held - ((held & 0x8000) << 1)).to(torch.int16).view(_TORCH[dtype]).double()
