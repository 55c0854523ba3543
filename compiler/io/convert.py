"""Quantized checkpoints in another program's layout, bit by bit: codes, scales and zero points are moved, nothing is
computed (but for GGUF's K-quants, whose products of two scales become one). What a layout cannot hold is refused before
anything is written.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io import compressed_tensors as ct
from lowbit.compiler.io import ct_floats, ct_rounded, gptq_write, native, vptq, vptq_tensors
from lowbit.compiler.io.card import converted_card
from lowbit.compiler.io.checkpoint import Checkpoint, read_checkpoint
from lowbit.compiler.io.expert_tensors import stacked_slices
from lowbit.compiler.io.kernels import MANIFEST
from lowbit.compiler.io.load import FormattedLinear, skeleton_of
from lowbit.compiler.io.misfits import find_misfits, refusal
from lowbit.compiler.io.parts import MARGIN, SHARD_BYTES, copy_extras, quantized_part, scale_part
from lowbit.compiler.io.source_folder import (
    carried_files,
    contained,
    find_licence,
    folder_digest,
    front_matter,
    load_json,
    open_shards,
)
from lowbit.compiler.io.write import Blob, Part, staged_folder, write_json, write_shards
from lowbit.compiler.runtime.experts import expert_layers
from lowbit.quantizers.formats import Format, WeightFormat

__all__ = ["LAYOUTS", "Conversion", "TargetLayout", "convert"]

TargetLayout = Literal["gptq", "compressed-tensors", "vptq", "lowbit", "gguf"]
LAYOUTS: tuple[TargetLayout, ...] = get_args(TargetLayout)
"""What a checkpoint can be converted to."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` wrote. layers: quantized ones; nbytes: of all tensors, or of the GGUF file; notes: what a user
    should know about the result."""

    out: Path
    source: str
    layout: TargetLayout
    layers: int
    nbytes: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "out": str(self.out),
            "from": self.source,
            "to": self.layout,
            "layers": self.layers,
            "bytes": self.nbytes,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Plan:
    """A checkpoint to be written. Layers are named by path, in the model's order; shapes: (N, K); kept: paths of linear
    layers that stay as they are; head: the output layer's path, empty without one."""

    checkpoint: Checkpoint
    layout: TargetLayout
    model: nn.Module
    formats: dict[str, WeightFormat]
    shapes: dict[str, tuple[int, int]]
    inputs: dict[str, native.StoredInput]
    kept: frozenset[str]
    head: str


def convert(folder: str | Path, out: str | Path, to: TargetLayout) -> Conversion:
    """Write the quantized checkpoint `folder`, or a GGUF file, in the layout `to`, with exactly its numbers, as `out`.

    Scales of GGUF's K-quants, and minima, are rounded to float16 (`gguf_blocks`), which the notes say.
    out: a folder that must be absent or empty; for `gguf` the file to write. Either appears complete or not at all.
    Raises CheckpointError: LB0123 the layout does not exist, or cannot hold the checkpoint; LB0110 `out` is not empty,
    LB0111 disk full, LB0115 not writable; and the codes of `read_checkpoint`.
    """
    if to not in LAYOUTS:
        raise CheckpointError("LB0123", f"there is no layout {str(to)[:40]!r}", hint=f"use {', '.join(LAYOUTS)}")
    checkpoint, out = read_checkpoint(folder), Path(out).expanduser()
    if to == "gguf":
        return _write_gguf(checkpoint, out)
    plan = _plan(checkpoint, to)
    _check(plan)
    parts = _parts(plan)
    extras = checkpoint.source.extras() if checkpoint.source else carried_files(checkpoint.folder)
    needed = sum(p.nbytes for p in parts) + sum(e.stat().st_size for e in extras) + MARGIN
    config, made = _config(plan), _provenance(plan)
    with staged_folder(out, needed) as stage:
        write_shards(stage, parts, SHARD_BYTES)
        copy_extras(extras, stage)
        _write_config(config, plan, stage)
        write_json(stage / "lowbit.json", made)
        (stage / "README.md").write_text(_card(plan, made), encoding="utf-8")
    nbytes = sum(p.nbytes for p in parts)
    return Conversion(out, checkpoint.method, to, len(plan.formats), nbytes, tuple(_notes(plan)))


def _write_gguf(checkpoint: Checkpoint, out: Path) -> Conversion:
    from lowbit.compiler.io.gguf_write import write_gguf

    if checkpoint.source is not None:
        raise CheckpointError("LB0123", "is a GGUF file already", where=str(checkpoint.folder))
    written = write_gguf(checkpoint, out)
    notes = [*_unkept_notes(checkpoint)]
    if checkpoint.kv:
        notes.append(f"a GGUF file does not say that the key-value cache is meant to be {checkpoint.kv}")
    size = written.stat().st_size
    return Conversion(written, checkpoint.method, "gguf", len(checkpoint.modules), size, tuple(notes))


def _plan(checkpoint: Checkpoint, layout: TargetLayout) -> _Plan:
    model = skeleton_of(checkpoint)
    paths: dict[str, nn.Linear] = {
        path: m for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)
    }
    ours = {path: m for path, m in paths.items() if isinstance(m, FormattedLinear) and path in checkpoint.modules}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return _Plan(
        checkpoint,
        layout,
        model,
        {path: m.fmt for path, m in ours.items()},
        {path: (m.out_features, m.in_features) for path, m in ours.items()},
        {path: m.given for path, m in ours.items() if m.given.to_dict()},
        frozenset(paths.keys() - ours.keys()),
        next((path for path, m in paths.items() if m is output), ""),
    )


def _check(plan: _Plan) -> None:
    """Raise CheckpointError (LB0123) for what the layout cannot hold, LB0114 for a checkpoint without layers."""
    where = str(plan.checkpoint.folder)
    if not plan.formats:
        raise CheckpointError("LB0114", "has no quantized layer", where=where)
    stacks = {piece.stack for piece in stacked_slices(plan.model).values()}
    if stacked := [name for name in plan.checkpoint.plain_names() if name in stacks]:
        why = f"has experts that are not quantized, stacked in one tensor ({stacked[0]}); no layout here holds both"
        raise CheckpointError("LB0123", why, where=where)
    experts = () if plan.layout == "lowbit" else expert_layers(plan.model)
    misfits = find_misfits(plan.layout, plan.formats, plan.shapes, plan.inputs, experts)
    if misfits:
        raise refusal(misfits, plan.layout, where, "the layout `lowbit` holds every layer")


def _form(plan: _Plan) -> Any:
    """The module that turns matrices into the layout's tensors."""
    if plan.layout == "compressed-tensors":
        if plan.inputs:
            return ct_rounded
        return ct_floats if any(map(ct_floats.layout_of, plan.formats.values())) else ct
    # lowbit's own layout has the tensors of pack-quantized, whatever the format.
    return {"gptq": gptq_write, "vptq": vptq_tensors}.get(plan.layout, ct)


def _parts(plan: _Plan) -> list[Part]:
    """Everything to write, a module at a time. Raises CheckpointError (LB0114) for two tensors of one name."""
    checkpoint, form = plan.checkpoint, _form(plan)
    parts = [_plain_part(checkpoint, name) for name in checkpoint.plain_names()]
    for path, fmt in plan.formats.items():
        parts.append(quantized_part(path, _loader(checkpoint, path), fmt, *plan.shapes[path], form))
    scales = {path: given.scale for path, given in plan.inputs.items() if given.scale is not None}
    parts += [scale_part(path, scale) for path, scale in scales.items()]
    names: set[str] = set()
    for blob in (blob for part in parts for blob in part.blobs):
        if blob.name in names:
            raise CheckpointError("LB0114", f"has another tensor {blob.name[:200]!r}", where=str(checkpoint.folder))
        names.add(blob.name)
    return parts


def _loader(checkpoint: Checkpoint, path: str) -> Callable[[], Any]:
    return lambda: checkpoint.qtensor(path)


def _plain_part(checkpoint: Checkpoint, name: str) -> Part:
    info = checkpoint.info(name)
    return Part((Blob(name, info.dtype, info.shape),), lambda: {name: checkpoint.tensor(name)})


def _config(plan: _Plan) -> dict[str, Any]:
    """Values of config.json, without the guard of native checkpoints."""
    given = plan.checkpoint.config
    values = {k: v for k, v in given.items() if not k.startswith("_") and k not in ("transformers_weights", "auto_map")}
    formats, kept = plan.formats, plan.kept
    if plan.layout == "gptq":
        quant = gptq_write.quantization_config(formats, kept - {plan.head}, plan.head)
    elif plan.layout == "vptq":
        biased = {path for path in formats if f"{path}.bias" in plan.checkpoint.names()}
        quant = vptq.quantization_config(formats, plan.shapes, biased, kept)
    elif plan.layout == "lowbit":
        quant = native.quantization_config(formats, plan.inputs, plan.checkpoint.kv, bool(expert_layers(plan.model)))
    else:
        quant = (ct_rounded if plan.inputs else ct).quantization_config(formats, kept)
    return {**values, "quantization_config": quant}


def _write_config(config: dict[str, Any], plan: _Plan, stage: Path) -> None:
    if plan.layout == "lowbit":
        config = native.guard(config, auto_map=True)
        (stage / native.CONFIG_FILE).write_text(native.CONFIG_SOURCE, encoding="utf-8")
    if plan.layout == "gptq":
        write_json(stage / "quantize_config.json", config["quantization_config"])
    write_json(stage / "config.json", config)


def _provenance(plan: _Plan) -> dict[str, Any]:
    """Values of lowbit.json: the checkpoint's own, where it has one, else which checkpoint this was made from."""
    checkpoint, version = plan.checkpoint, importlib.metadata.version("lowbit")
    made = _own_provenance(checkpoint)
    if made is None:
        source = {"model": checkpoint.folder.resolve().name, "digest": _digest(checkpoint)}
        made = {"schema": 1, "lowbit": version, "layout": "", "formats": {}, "source": source}
    if checkpoint.kv and plan.layout != "lowbit":
        # Only here do other layouts keep it: `Checkpoint.kv` looks for it in the scheme.
        scheme = made.get("scheme")
        made["scheme"] = {**(scheme if isinstance(scheme, dict) else {}), "kv": checkpoint.kv}
    texts = {path: str(fmt) for path, fmt in plan.formats.items()}
    converted = {"from": checkpoint.method, "lowbit": version}
    return {**made, "layout": plan.layout, "formats": texts, "converted": converted}


def _digest(checkpoint: Checkpoint) -> str:
    if checkpoint.source is not None:
        return checkpoint.source.digest()
    return folder_digest(checkpoint.folder, open_shards(checkpoint.folder))


def _own_provenance(checkpoint: Checkpoint) -> dict[str, Any] | None:
    if not (checkpoint.folder / "lowbit.json").exists():
        return None
    return load_json(contained(checkpoint.folder, "lowbit.json"), "LB0114")


def _card(plan: _Plan, made: Mapping[str, Any]) -> str:
    folder, given, source = plan.checkpoint.folder, plan.checkpoint.source, made.get("source")
    own = front_matter(folder)
    base = given.base_model if given else own.get("base_model")
    model = source.get("model") if isinstance(source, dict) else None
    licence = given.licence.name if given else find_licence(folder, own.get("license")).name
    layouts = (plan.checkpoint.method, plan.layout)
    name = base or str(model or folder.resolve().name)
    remarks, rounded = list(_remarks(plan)), plan.checkpoint.notes
    return converted_card(name, base, licence, plan.formats, plan.shapes, layouts, remarks, rounded)


def _remarks(plan: _Plan) -> Iterable[str]:
    """What happens to inputs and the cache, where anything does."""
    if rounded := sorted({given.activation for given in plan.inputs.values() if given.activation}):
        names = " or ".join(f"`{name}`" for name in rounded)
        yield f"Inputs of {len(plan.inputs)} layers are rounded to {names} at run time."
    if plan.checkpoint.kv:
        yield f"It is meant for a key-value cache in `{plan.checkpoint.kv}`: `lowbit.QuantizedCache(model)`."


def _notes(plan: _Plan) -> Iterable[str]:
    yield from _unkept_notes(plan.checkpoint)
    if plan.layout == "compressed-tensors" and not plan.inputs:
        dtype = getattr(getattr(plan.model, "config", None), "dtype", None) or torch.float32
        formats = {fmt for fmt in plan.formats.values() if isinstance(fmt, Format)}
        yield from sorted({note for fmt in formats if (note := ct.scale_note(fmt, dtype))})


def _unkept_notes(checkpoint: Checkpoint) -> Iterable[str]:
    yield from checkpoint.notes
    if (checkpoint.folder / MANIFEST).exists():
        yield "compiled kernels are not carried along: run `quantize export` on the result"
