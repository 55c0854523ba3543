"""The torch operator behind quantized experts: `torch.ops.lowbit.grouped_linear`, one matrix for each run of rows.

What torch's grouped product is for float experts. One operator for all experts, because how many tokens each of them
gets is known only when it runs: a graph with a call for each would depend on the data.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

from lowbit.compiler.runtime.dispatch import parse_spec
from lowbit.compiler.runtime.ops import LIBRARY, output_features, run_linear

__all__ = ["DENSE"]

DENSE = ""
"""In the place of a spec: the expert's matrix is a float one, multiplied by torch."""

LIBRARY.define(
    "grouped_linear(Tensor x, Tensor ends, Tensor[] weight, Tensor? bias, str[] specs) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _grouped_linear(x: Tensor, ends: Tensor, weight: list[Tensor], bias: Tensor | None, specs: list[str]) -> Tensor:
    """x [rows, K], sorted by expert; ends int64 [E]: where each expert's rows end; bias [E, N].

    specs: one for all experts, whose operands are then stacked, [E, ...]; or one each, with operands one after the
    other.
    """
    x, out = x.contiguous(), x.new_empty((x.shape[0], _features(weight, specs)))
    for expert, (start, stop) in enumerate(pairwise([0, *ends.tolist()])):
        if stop > start:
            spec = specs[0] if len(specs) == 1 else specs[expert]
            operands = _operands(weight, specs, expert)
            added = None if bias is None else bias[expert]
            if spec == DENSE:
                given = None if added is None else added.to(x.dtype)
                out[start:stop] = torch.nn.functional.linear(x[start:stop], operands[0].to(x.dtype), given)
            else:
                run_linear(x[start:stop], operands, added, None, spec, out[start:stop])
    return out


def _operands(weight: list[Tensor], specs: list[str], expert: int) -> list[Tensor]:
    if len(specs) == 1:
        return [tensor[expert] for tensor in weight]
    counts = [1 if spec == DENSE else len(parse_spec(spec).operands) for spec in specs[: expert + 1]]
    return weight[sum(counts[:-1]) : sum(counts)]


def _features(weight: list[Tensor], specs: list[str]) -> int:
    return output_features(specs[0]) if specs[0] != DENSE else weight[0].shape[-2]


def _grouped_linear_fake(
    x: Tensor, ends: Tensor, weight: list[Tensor], bias: Tensor | None, specs: list[str]
) -> Tensor:
    return x.new_empty((x.shape[0], _features(weight, specs)))


# As in `ops`: the operator's inside is not for torch.compile.
_SKIP = eval_frame._FrameAction.SKIP
eval_frame.set_code_exec_strategy(_grouped_linear.__code__, eval_frame._FrameExecStrategy(_SKIP, _SKIP))

for _key in ("CPU", "CUDA"):
    LIBRARY.impl("grouped_linear", _grouped_linear, _key)
torch.library.register_fake("lowbit::grouped_linear", _grouped_linear_fake, lib=LIBRARY)
