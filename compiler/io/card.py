"""The model card of a quantized checkpoint: README.md with front matter that the hub understands."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lowbit.compiler.io.source import ModelSource
from lowbit.quantizers.formats import WeightFormat
from lowbit.quantizers.rewrites import rewrite_text
from lowbit.quantizers.scheme import Scheme

__all__ = ["converted_card", "model_card"]

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

_NOTES = {
    "compressed-tensors": "vLLM and transformers (with compressed-tensors 0.18 or newer) load it as it is; with "
    "`import lowbit`, `lowbit.load` runs it on compiled kernels.",
    "vptq": "transformers loads it with the vptq package and a GPU (4.53 does; 5.23 stops at any checkpoint in VPTQ's "
    "layout); with `import lowbit`, `lowbit.load` runs it on compiled kernels.",
    "gptq": "GPTQModel, vLLM and transformers (with gptqmodel) read this layout; with `import lowbit`, `lowbit.load` "
    "runs it on compiled kernels.",
    "lowbit": "The format needs lowbit: `import lowbit` before loading. Without it, loading fails.",
}
"""Who can load a checkpoint, by layout."""


def model_card(
    source: ModelSource,
    scheme: Scheme,
    formats: Mapping[str, WeightFormat],
    shapes: Mapping[str, tuple[int, int]],
    layout: str,
    report: Mapping[str, Any],
) -> str:
    """Text of the card. Names and licence come from the source model and are shown only as plain words."""
    name = _plain(source.base_model or source.origin)
    sections = [
        _front_matter(source.base_model, source.licence.name, layout),
        f"# {name}, quantized with lowbit",
        f"Linear layers are stored as `{scheme.weight}` "
        f"(scheme `{_plain(scheme.name)}`, method `{_plain(scheme.method)}`).",
        _activations(scheme),
        _formats_table(formats, shapes),
        _report_table(report),
        _usage(layout),
    ]
    return "\n\n".join(s for s in sections if s) + "\n"


def converted_card(
    name: str,
    base_model: str | None,
    licence: str | None,
    formats: Mapping[str, WeightFormat],
    shapes: Mapping[str, tuple[int, int]],
    layouts: tuple[str, str],
    remarks: Sequence[str] = (),
    rounded: Sequence[str] = (),
) -> str:
    """Text of the card of a checkpoint that was converted from the first of `layouts` to the second.

    name, base_model, licence: as the checkpoint it was made from says, shown only as plain words. remarks: sentences
    about inputs and the cache. rounded: what is not exactly as it was.
    """
    before, after = layouts
    kept = f"the codes are the same, bit by bit; {'; '.join(rounded)}" if rounded else ""
    sections = [
        _front_matter(base_model, licence, after),
        f"# {_plain(name)}, quantized",
        f"Converted by lowbit from the layout {before}: {kept or 'the quantized weights are the same, bit by bit'}.",
        " ".join(remarks),
        _formats_table(formats, shapes),
        _usage(after),
    ]
    return "\n\n".join(s for s in sections if s) + "\n"


def _activations(scheme: Scheme) -> str:
    """What happens to activations and the cache, where anything does."""
    lines = []
    rewrites = ", ".join(f"`{rewrite_text(r)}`" for r in scheme.rewrites)
    if scheme.rewrites:
        lines.append(f"Before that the model was rewritten without changing what it computes: {rewrites}.")
    if scheme.activation is not None:
        lines.append(f"Their inputs are rounded to `{scheme.activation}` at run time.")
    if scheme.kv is not None:
        lines.append(f"It is meant for a key-value cache in `{scheme.kv}`: `lowbit.QuantizedCache(model)`.")
    return " ".join(lines)


def _front_matter(base_model: str | None, licence: str | None, layout: str) -> str:
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if base_model and _HUB_ID.fullmatch(base_model):
        lines += [f"base_model: {base_model}", "base_model_relation: quantized"]
    if licence and _WORD.fullmatch(licence):
        lines.append(f"license: {licence.lower()}")
    tags = ["lowbit", "quantized", *([layout] if layout != "lowbit" else [])]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _formats_table(formats: Mapping[str, WeightFormat], shapes: Mapping[str, tuple[int, int]]) -> str:
    """Layers, weights and stored bits per weight of every format."""
    counts: dict[str, tuple[int, int, float]] = {}
    for path, fmt in formats.items():
        n, k = shapes[path]
        layers, weights, bits = counts.get(str(fmt), (0, 0, 0.0))
        counts[str(fmt)] = (layers + 1, weights + n * k, bits + fmt.bits_per_weight(n, k) * n * k)
    rows = [
        f"| `{name}` | {layers} | {weights:,} | {bits / weights:.3f} |"
        for name, (layers, weights, bits) in counts.items()
    ]
    return "\n".join(["| format | layers | weights | bits per weight |", "|---|---:|---:|---:|", *rows])


def _report_table(report: Mapping[str, Any]) -> str:
    """The report's totals: its plain values, and those of its `totals`."""
    totals = report.get("totals")
    values = {**report, **(totals if isinstance(totals, Mapping) else {})}
    rows = [
        f"| {_plain(str(key).replace('_', ' '))} | {_value(value)} |"
        for key, value in values.items()
        if isinstance(value, (str, int, float))
    ]
    return "\n".join(["| figure | value |", "|---|---:|", *rows]) if rows else ""


def _value(value: str | int | float) -> str:
    if isinstance(value, bool) or isinstance(value, str):
        return _plain(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _plain(text: str) -> str:
    """Text that is not markup, whatever the model's files called themselves."""
    return re.sub(r"[^\w .,:/@+()=%-]", "_", text)[:120].strip() or "model"


def _usage(layout: str) -> str:
    note = _NOTES[layout]
    code = [
        "```python",
        "import lowbit",
        "",
        'model = lowbit.compile(lowbit.load("path/to/this/folder"), max_tokens=512)',
        "```",
    ]
    return "\n".join(["## Use", "", note, "", *code])
