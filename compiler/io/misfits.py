"""Which layers of a quantized checkpoint another program's layout cannot hold, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io import compressed_tensors as ct
from lowbit.compiler.io import ct_rounded, gptq_write, vptq
from lowbit.compiler.io.native import StoredInput
from lowbit.quantizers.formats import Format, WeightFormat

__all__ = ["find_misfits", "refusal"]

Shape = tuple[int, int]


def find_misfits(
    layout: str,
    formats: Mapping[str, WeightFormat],
    shapes: Mapping[str, Shape],
    inputs: Mapping[str, StoredInput],
    experts: Collection[str] = (),
) -> dict[str, str]:
    """The reason by path of every layer that `layout` cannot hold, in the order of the model; empty when it holds all.

    shapes: (N, K). inputs: what layers do to their inputs, where they do anything. experts: paths of the model's layers
    of experts, quantized or not.
    """
    if layout == "lowbit":
        return {}
    if experts:
        return dict.fromkeys(experts, "experts are layers of their own, which only lowbit's own layout has")
    if layout == "compressed-tensors" and inputs:
        return {} if ct_rounded.can_hold(formats, inputs) else _rounded_misfits(formats, inputs)
    found = {
        path: why for path, fmt in formats.items() if (why := _problem(layout, fmt, shapes[path], inputs.get(path)))
    }
    return found or _mixed(layout, formats)


def refusal(misfits: Mapping[str, str], layout: str, where: str, hint: str) -> CheckpointError:
    """LB0123 for layers that `layout` cannot hold, of which there is one: how many, and the first with its reason."""
    path, why = next(iter(misfits.items()))
    count = f"{len(misfits)} layers do" if len(misfits) > 1 else "1 layer does"
    what = f"{count} not fit the layout {layout}, this one first: {why}"
    return CheckpointError("LB0123", what, where=f"{where}: {path}", hint=hint)


def _problem(layout: str, fmt: WeightFormat, shape: Shape, given: StoredInput | None) -> str | None:
    if given is not None:
        return f"its inputs are {_described(given)}, which the layout cannot say"
    forms = {"gptq": gptq_write.can_express, "vptq": vptq.can_express, "compressed-tensors": ct.can_express}
    return forms[layout](fmt, *shape)


def _described(given: StoredInput) -> str:
    rotated = [f"rotated in blocks of {given.rotate}"] if given.rotate else []
    return " and ".join([*rotated, *([f"rounded to {given.activation}"] if given.activation else [])])


def _rounded_misfits(formats: Mapping[str, WeightFormat], inputs: Mapping[str, StoredInput]) -> dict[str, str]:
    """Layers of a checkpoint with rounded inputs that int-quantized or float-quantized cannot hold."""
    needs = "with rounded inputs, compressed-tensors holds int8.ch.sym with int8.token, or e4m3.ch with e4m3.token"
    alone = [path for path, fmt in formats.items() if not ct_rounded.can_hold({path: fmt}, inputs)]
    if not alone:
        return dict.fromkeys(_odd_ones(formats), f"{needs}, for all layers alike")
    return {path: f"it is {formats[path]}{_with(inputs.get(path))}; {needs}" for path in alone}


def _with(given: StoredInput | None) -> str:
    return f" with inputs {_described(given)}" if given is not None else " with inputs as they come"


def _mixed(layout: str, formats: Mapping[str, WeightFormat]) -> dict[str, str]:
    """Layers whose format the layout holds, but not beside that of most layers."""
    if layout == "vptq":
        return {}
    why = "GPTQ has one format for all layers" if layout == "gptq" else ct.config_problem(formats.values())
    if layout == "gptq":  # each layer says for itself what order its columns are in
        formats = {path: replace(fmt, ordered=False) for path, fmt in formats.items() if isinstance(fmt, Format)}
    odd = _odd_ones(formats)
    usual = next((fmt for path, fmt in formats.items() if path not in odd), None)
    return {path: f"it is {formats[path]}, most are {usual}, and {why}" for path in odd} if why else {}


def _odd_ones(formats: Mapping[str, WeightFormat]) -> list[str]:
    """Paths of the layers whose format is not the most frequent one."""
    usual = Counter(formats.values()).most_common(1)[0][0]
    return [path for path, fmt in formats.items() if fmt != usual]
