"""Quantized checkpoints: `write_checkpoint` and `read_checkpoint`.

A checkpoint is a model folder as transformers writes it: safetensors, config.json with a `quantization_config`,
tokenizer and licence, a model card, and lowbit.json, which says how it was made. Where compressed-tensors can hold
every layer's format that layout is used, so that transformers and vLLM read it without lowbit; where all layers are
vector-quantized in ways that VPTQ's layout can hold, that one, for the vptq package; otherwise the native one.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import torch

from lowbit.compiler.errors import CheckpointError, FormatError
from lowbit.compiler.io import (
    aqlm,
    awq,
    bitsandbytes,
    block_fp8,
    ct_floats,
    ct_rounded,
    gptq,
    native,
    vptq,
    vptq_tensors,
)
from lowbit.compiler.io import compressed_tensors as ct
from lowbit.compiler.io.card import model_card
from lowbit.compiler.io.parts import MARGIN, SHARD_BYTES, copy_extras, quantized_part, scale_part
from lowbit.compiler.io.safetensors_file import SafetensorsFile, TensorInfo
from lowbit.compiler.io.source import ModelSource, is_gguf
from lowbit.compiler.io.source_folder import contained, load_json, open_shards
from lowbit.compiler.io.write import Blob, Part, staged_folder, write_json, write_shards
from lowbit.compiler.runtime.experts import expert_layers
from lowbit.quantizers.formats import ChoiceFormat, Format, VectorFormat, WeightFormat, parse_format
from lowbit.quantizers.scheme import Scheme
from lowbit.quantizers.weights import QWeight, stored_names

__all__ = [
    "Checkpoint",
    "Reader",
    "checkpoint_layout",
    "export_layout",
    "read_checkpoint",
    "stored_dtype",
    "write_checkpoint",
]

Layout = Literal["compressed-tensors", "lowbit", "vptq"]


def export_layout(fmt: WeightFormat, n: int | None = None, k: int | None = None) -> Layout:
    """The layout a checkpoint gets when it holds an [n, k] matrix in `fmt`."""
    if not ct.can_express(fmt, n, k):
        return "compressed-tensors"
    return "lowbit" if vptq.can_express(fmt, n, k) else "vptq"


def write_checkpoint(
    out: Path,
    source: ModelSource,
    quantized: Mapping[str, Callable[[], QWeight]],
    scheme: Scheme,
    *,
    report: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
    replaced: Mapping[str, Callable[[], torch.Tensor]] | None = None,
    inputs: Mapping[str, native.StoredInput] | None = None,
    formats: Mapping[str, WeightFormat] | None = None,
) -> Path:
    """Write the model of `source` to the folder `out`, with the weights of some modules replaced.

    quantized: loader of the quantized weight by module path, called when the weight is written (and once before, where
    the scheme has no format for the module). report: figures of the run, for report.json and the card. dtype: of the
    other float tensors and of config.json; theirs when None. replaced: loaders of other tensors whose values a run
    changed (norm weights), by name. inputs: what quantized modules do to their inputs, by path. formats: of the
    quantized weights, by path, where they are not simply the scheme's. The folder appears
    complete or not at all. Raises CheckpointError: LB0110 `out` is not empty, LB0111 disk full, LB0114 a module or
    tensor that does not fit, LB0115 not writable.
    """
    planned: Mapping[str, WeightFormat | None] = formats or {path: scheme.format_for(path) for path in quantized}
    formats = {path: _planned_format(path, load, planned[path]) for path, load in quantized.items()}
    shapes = {path: _matrix_shape(source, path) for path in quantized}
    inputs = {path: given for path, given in (inputs or {}).items() if given.to_dict()}
    experts = bool(expert_layers(source.empty_model()))
    layout = checkpoint_layout(formats, shapes, inputs, experts=experts)
    form = vptq_tensors if layout == "vptq" else ct_rounded if inputs and layout != "lowbit" else ct
    if form is ct and layout == "compressed-tensors" and any(map(ct_floats.layout_of, formats.values())):
        form = ct_floats
    parts = _parts(source, quantized, formats, form, dtype, replaced or {})
    parts += [scale_part(path, given.scale) for path, given in inputs.items() if given.scale is not None]
    extras = source.extras()
    needed = sum(p.nbytes for p in parts) + sum(e.stat().st_size for e in extras) + MARGIN
    config = _config(source, formats, layout, dtype, inputs, str(scheme.kv or ""))
    with staged_folder(out, needed) as stage:
        write_shards(stage, parts, shard_bytes)
        copy_extras(extras, stage)
        if layout == "lowbit":
            config = native.guard(config, auto_map=True)
            (stage / native.CONFIG_FILE).write_text(native.CONFIG_SOURCE, encoding="utf-8")
        write_json(stage / "config.json", config)
        write_json(stage / "lowbit.json", _provenance(source, scheme, formats, layout))
        if report:
            write_json(stage / "report.json", json.loads(json.dumps(report, default=str)))
        card = model_card(source, scheme, formats, shapes, layout, report)
        (stage / "README.md").write_text(card, encoding="utf-8")
    return out


def checkpoint_layout(
    formats: Mapping[str, WeightFormat],
    shapes: Mapping[str, tuple[int, int]],
    inputs: Mapping[str, native.StoredInput] | None = None,
    *,
    experts: bool = False,
) -> Layout:
    """The layout of a checkpoint whose modules, by path, have these formats and (N, K), and do this to their inputs.

    experts: there are experts as layers of their own, which transformers' models do not have.
    """
    if experts:
        return "lowbit"
    if inputs:
        return "compressed-tensors" if ct_rounded.can_hold(formats, inputs) else "lowbit"
    layouts = {export_layout(fmt, *shapes[path]) for path, fmt in formats.items()} or {"compressed-tensors"}
    if layouts == {"vptq"}:
        return "vptq"
    common = layouts == {"compressed-tensors"} and not ct.config_problem(formats.values())
    return "compressed-tensors" if common else "lowbit"


def _planned_format(path: str, load: Callable[[], QWeight], planned: WeightFormat | None) -> WeightFormat:
    """The planned format, which is checked again when the weight is written; the weight's own when there is none or it
    leaves a choice."""
    return load().fmt if planned is None or isinstance(planned, ChoiceFormat) else planned


def _matrix_shape(source: ModelSource, path: str) -> tuple[int, int]:
    name = f"{path}.weight"
    shape = source.shape(name) if name in source.names() else ()
    if len(shape) != 2:
        raise CheckpointError("LB0114", "is not a linear layer with weights of its own", where=path)
    return (shape[0], shape[1])


def _parts(
    source: ModelSource,
    quantized: Mapping[str, Callable[[], QWeight]],
    formats: Mapping[str, WeightFormat],
    form: Any,
    dtype: torch.dtype | None,
    replaced: Mapping[str, Callable[[], torch.Tensor]],
) -> list[Part]:
    parts = []
    for name in source.names():
        path = name.removesuffix(".weight")
        if name.endswith(".weight") and path in quantized:
            n, k = _matrix_shape(source, path)
            parts.append(quantized_part(path, quantized[path], formats[path], n, k, form))
        else:
            parts.append(_plain_part(source, name, dtype, replaced.get(name)))
    return parts


def stored_dtype(source: ModelSource, name: str, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype in which an export stores a tensor that is not quantized: `dtype`, the source's choice, or its own."""
    own = source.dtype(name)
    if dtype is not None and own.is_floating_point:
        return dtype
    return source.kept_dtype if source.kept_dtype is not None and len(source.shape(name)) > 1 else own


def _plain_part(
    source: ModelSource, name: str, dtype: torch.dtype | None, load: Callable[[], torch.Tensor] | None = None
) -> Part:
    target = stored_dtype(source, name, dtype)

    def tensors() -> dict[str, torch.Tensor]:
        value = (load() if load else source.tensor(name)).to(target)
        if target is torch.float16 and not bool(value.isfinite().all()):
            raise CheckpointError("LB0114", f"{name} has values that float16 cannot hold", hint="pass a dtype")
        return {name: value}

    return Part((Blob(name, target, source.shape(name)),), tensors)


def _config(
    source: ModelSource,
    formats: Mapping[str, WeightFormat],
    layout: Layout,
    dtype: torch.dtype | None,
    inputs: Mapping[str, native.StoredInput],
    kv: str,
) -> dict[str, Any]:
    """Values of config.json, without the guard of native checkpoints."""
    values = config_of(source)
    model = source.empty_model()
    values["architectures"] = [type(model).__name__]
    kept_dtype = dtype or getattr(source.config, "dtype", None) or _common_dtype(source)
    values["dtype"] = str(kept_dtype).removeprefix("torch.")
    if layout == "lowbit":
        values["quantization_config"] = native.quantization_config(formats, inputs, kv, bool(expert_layers(model)))
    else:
        linears = [p for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, torch.nn.Linear)]
        kept = set(linears) - set(formats)
        if layout == "vptq":
            shapes = {path: _matrix_shape(source, path) for path in formats}
            biased = {path for path in formats if f"{path}.bias" in source.names()}
            values["quantization_config"] = vptq.quantization_config(formats, shapes, biased, kept)
        else:
            form = ct_rounded if inputs else ct
            values["quantization_config"] = form.quantization_config(formats, kept)
    return values


def config_of(source: ModelSource) -> dict[str, Any]:
    """Values of config.json for a model, without names of files and folders that a checkpoint of it does not have."""
    values: dict[str, Any] = json.loads(source.config.to_json_string(use_diff=True))
    return {k: v for k, v in values.items() if not k.startswith("_") and k not in ("transformers_weights", "auto_map")}


def _common_dtype(source: ModelSource) -> torch.dtype:
    """The dtype that holds most of the model's numbers."""
    counts: dict[torch.dtype, int] = {}
    for name in source.names():
        counts[source.dtype(name)] = counts.get(source.dtype(name), 0) + math.prod(source.shape(name))
    floats = {dtype: count for dtype, count in counts.items() if dtype.is_floating_point}
    return max(floats, key=lambda dtype: floats[dtype], default=torch.float32)


def _provenance(
    source: ModelSource, scheme: Scheme, formats: Mapping[str, WeightFormat], layout: Layout
) -> dict[str, Any]:
    """Values of lowbit.json: how the checkpoint was made, and the format of every module."""
    return {
        "schema": 1,
        "lowbit": importlib.metadata.version("lowbit"),
        "layout": layout,
        "scheme": scheme.to_dict(),
        "formats": {path: str(fmt) for path, fmt in formats.items()},
        "source": {"model": source.base_model or source.origin, "digest": source.digest()},
    }


class TensorFile(Protocol):
    """A file whose tensors are read on request."""

    def info(self, name: str) -> TensorInfo:
        """Type and shape of one."""

    def tensor(self, name: str) -> torch.Tensor:
        """Read one."""


class Reader(Protocol):
    """How the tensors of modules in another program's layout become weights. Modules are named by path."""

    def suffixes(self, path: str) -> tuple[str, ...]:
        """Names that a module's tensors may have."""

    def shape(self, path: str) -> tuple[int, int] | None:
        """(N, K), or None where tensors have to be read for it."""

    def weight(self, path: str, tensors: Mapping[str, torch.Tensor], where: str) -> QWeight:
        """The weight, exactly as stored; CheckpointError for tensors that do not fit."""


_Found = tuple[Reader, dict[str, WeightFormat]]


@dataclass(frozen=True)
class Checkpoint:
    """A quantized checkpoint on disk, whose headers are validated and whose tensors are read on request.

    folder: where it is, for GGUF the file. config: values of config.json (without the guard of native checkpoints).
    modules: format by module path. source: the same as a model of plain numbers, where it is a GGUF file. notes: what a
    user should know about how it is read.
    """

    folder: Path
    config: dict[str, Any]
    quantization_config: dict[str, Any]
    modules: dict[str, WeightFormat]
    _files: Mapping[str, TensorFile]
    _reader: Reader | None = None
    _inputs: Mapping[str, native.StoredInput] = field(default_factory=dict)
    source: ModelSource | None = None
    notes: tuple[str, ...] = ()

    @property
    def method(self) -> str:
        """`compressed-tensors`, `lowbit`, `vptq`, `gptq`, `awq`, `aqlm`, `bitsandbytes`, `fp8` or `gguf`."""
        return str(self.quantization_config["quant_method"])

    @property
    def kv(self) -> str:
        """The format its key-value cache is meant to have, as text; empty where it says none."""
        if "kv" in self.quantization_config or not (self.folder / "lowbit.json").exists():
            return native.kv_from_config(self.quantization_config, str(self.folder))
        scheme = load_json(contained(self.folder, "lowbit.json"), "LB0114").get("scheme")
        return native.kv_from_config(scheme if isinstance(scheme, dict) else {}, str(self.folder))

    def names(self) -> list[str]:
        """Names of all stored tensors."""
        return list(self._files)

    def plain_names(self) -> list[str]:
        """Names of the tensors that belong to no quantized weight."""
        taken = {f"{path}.{name}" for path in self.modules for name in self._suffixes(path)}
        return [name for name in self._files if name not in taken]

    def module_names(self, path: str) -> list[str]:
        """Full names of the stored tensors of a quantized module's weight."""
        return [f"{path}.{name}" for name in self._suffixes(path) if f"{path}.{name}" in self._files]

    def _suffixes(self, path: str) -> tuple[str, ...]:
        if self._reader is not None:
            return self._reader.suffixes(path)
        if self._float_layout(path):
            return tuple(ct_floats.tensor_shapes(self.modules[path], 1, 32))
        fmt, inputs = self.modules[path], self._inputs.get(path, native.StoredInput()).tensors
        if self.method == "compressed-tensors" and isinstance(fmt, Format):
            return (*stored_names(replace(fmt, ordered=False)), ct.G_IDX, *inputs)
        return (*stored_names(fmt), *inputs)

    def _float_layout(self, path: str) -> bool:
        """Whether a module is stored as compressed-tensors stores small floats."""
        return self.method == "compressed-tensors" and ct_floats.layout_of(self.modules[path]) is not None

    def layer_input(self, path: str) -> native.StoredInput:
        """What a quantized module does to its input, static scales included."""
        given = self._inputs.get(path, native.StoredInput())
        return replace(given, scale=self.tensor(f"{path}.input_scale")) if given.tensors else given

    def shape(self, path: str) -> tuple[int, int]:
        """(N, K) of a quantized module. Errors as `qtensor`; only GPTQ checkpoints have to unpack the weight."""
        if self._reader is not None and path in self.modules and (found := self._reader.shape(path)):
            return found
        name = f"{path}.weight_shape"
        if name in self._files and self._files[name].info(name).shape == (2,):
            n, k = (int(d) for d in self.tensor(name))
            return (n, k)
        return self.qtensor(path).shape

    def info(self, name: str) -> TensorInfo:
        """Type and shape of a stored tensor, without reading it; raises CheckpointError (LB0114) as `tensor`."""
        return self._file(name).info(name)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one stored tensor; raises CheckpointError (LB0114) when there is none of that name."""
        return self._file(name).tensor(name)

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            raise CheckpointError("LB0114", f"has no tensor {name[:200]!r}", where=str(self.folder))
        return self._files[name]

    def qtensor(self, path: str) -> QWeight:
        """The quantized weight of a module, exactly as stored.

        Raises CheckpointError: LB0113 when a GPTQ layer contradicts its config, LB0114 when its tensors
        do not fit its format, or the code of its layout (`read_checkpoint`).
        """
        tensors = self.module_tensors(path)
        where = f"{self.folder}: {path}"
        if self._reader is not None:
            return self._reader.weight(path, tensors, where)
        if self._float_layout(path):
            return ct_floats.from_tensors(self.modules[path], tensors, where)
        return ct.from_tensors(self.modules[path], tensors, where)

    def module_tensors(self, path: str) -> dict[str, torch.Tensor]:
        """The stored tensors of a quantized module's weight, by their name in the module."""
        if path not in self.modules:
            raise CheckpointError("LB0114", "is not a quantized module", where=f"{self.folder}: {path}")
        return {name.removeprefix(f"{path}."): self.tensor(name) for name in self.module_names(path)}


_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, SafetensorsFile], str], _Found]] = {
    "aqlm": aqlm.read_layers,
    "awq": awq.read_layers,
    "bitsandbytes": bitsandbytes.read_layers,
    "fp8": block_fp8.read_layers,
    "gptq": gptq.read_layers,
}
"""quantization_config, files and folder -> the layers' reader and their formats, by quantization method."""


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a quantized checkpoint: lowbit's, compressed-tensors (pack-quantized), GPTQ, AWQ, AQLM, VPTQ, bitsandbytes,
    FP8 in blocks, or a GGUF file.

    Raises CheckpointError: LB0101 no such folder, LB0102 broken file, LB0103 bad index, LB0108 bad config.json, LB0109
    a GGUF file that cannot be read, LB0113 GPTQ of a kind that is not supported, LB0114 not a quantized checkpoint, or
    one that contradicts itself, LB0118 VPTQ of a kind that is not supported, LB0122 AWQ, AQLM, bitsandbytes, FP8 or
    GGUF of such a kind.
    """
    folder = Path(folder).expanduser()
    if is_gguf(folder):
        return _read_gguf(folder)
    if not folder.is_dir():
        raise CheckpointError("LB0101", "no such folder", where=str(folder))
    config = load_json(contained(folder, "config.json"), "LB0108")
    quant = config.get("quantization_config")
    if not isinstance(quant, dict):
        raise CheckpointError("LB0114", "is not a quantized checkpoint", where=str(folder), hint="run `quantize run`")
    files = open_shards(folder)
    method = quant.get("quant_method")
    if method == "lowbit":
        config = native.unguard(config) if config.get("model_type") == "lowbit" else config
        own = native.formats_from_config(quant, str(folder))
        inputs = native.inputs_from_config(quant, str(folder))
        return Checkpoint(folder, config, quant, own, files, _inputs=inputs)
    if method == "compressed-tensors":
        if (found := ct_rounded.formats_from_config(quant, _scale_dtypes(files), str(folder))) is not None:
            weights = {path: f"{path}.weight" for path in found[0] if f"{path}.weight" in files}
            shapes = {path: files[name].header.tensors[name].shape for path, name in weights.items()}
            return Checkpoint(
                folder, config, quant, found[0], files, ct_rounded.RoundedReader(found[0], shapes), found[1]
            )
        return Checkpoint(folder, config, quant, _ct_formats(folder, quant, files), files)
    if method == "vptq":
        layers = _vptq_layers(folder, quant, files)
        formats: dict[str, WeightFormat] = {path: layer.fmt for path, layer in layers.items()}
        return Checkpoint(folder, config, quant, formats, files, vptq_tensors.VPTQReader(layers))
    if method in _READERS:
        reader, found_formats = _READERS[method](quant, files, str(folder))
        return Checkpoint(folder, config, quant, found_formats, files, reader)
    raise CheckpointError(
        "LB0114", f"quantization method {str(method)[:40]!r} is not supported", where=str(folder),
        hint=f"lowbit reads checkpoints of lowbit, compressed-tensors, vptq, {', '.join(_READERS)}",
    )  # fmt: skip


def _read_gguf(path: Path) -> Checkpoint:
    from lowbit.compiler.io.gguf_checkpoint import open_gguf

    source, tensors, reader = open_gguf(path)
    formats: dict[str, WeightFormat] = {layer: reader.format(layer) for layer in reader.matrices}
    files, quant = dict.fromkeys(source.names(), tensors), {"quant_method": "gguf"}
    return Checkpoint(path, config_of(source), quant, formats, files, reader, source=source, notes=reader.notes())


def _scale_dtypes(files: dict[str, SafetensorsFile]) -> dict[str, torch.dtype]:
    """dtype of `weight_scale` by module path."""
    names = [name for name in files if name.endswith(".weight_scale")]
    return {name.removesuffix(".weight_scale"): files[name].header.tensors[name].dtype for name in names}


def _ct_formats(folder: Path, quant: dict[str, Any], files: dict[str, SafetensorsFile]) -> dict[str, WeightFormat]:
    """Formats of a compressed-tensors checkpoint: from its config, which must agree with lowbit.json if that exists."""
    packed = [name.removesuffix(".weight_packed") for name in files if name.endswith(".weight_packed")]
    scaled = [name.removesuffix(".weight_scale") for name in files if name.endswith(".weight_scale")]
    paths = list(dict.fromkeys([*packed, *scaled]))
    scales = {}
    for path in paths:
        name = f"{path}.weight_scale"
        if name not in files:
            raise CheckpointError("LB0114", "weight_scale is missing", where=f"{folder}: {path}")
        scales[path] = files[name].header.tensors[name].dtype
    formats: dict[str, WeightFormat] = {
        path: _with_order(path, fmt, files, f"{folder}: {path}")
        for path, fmt in ct.formats_from_config(quant, scales, str(folder)).items()
    }
    declared = _declared_formats(folder)
    if declared is not None and declared != formats:
        raise _disagreement(folder)
    return formats


def _with_order(path: str, fmt: Format, files: Mapping[str, SafetensorsFile], where: str) -> Format:
    """`fmt`, ordered where the columns of a compressed-tensors module are."""
    name = f"{path}.{ct.G_IDX}"
    ordered = name in files and ct.column_order_of(fmt, files[name].tensor(name), where) is not None
    return replace(fmt, ordered=ordered)


def _vptq_layers(folder: Path, quant: dict[str, Any], files: dict[str, SafetensorsFile]) -> dict[str, vptq.VPTQLayer]:
    """Layers of a VPTQ checkpoint, with the formats of lowbit.json (a percentage of outliers) where that exists."""
    layers = vptq.read_layers(quant, files, str(folder))
    declared = _declared_formats(folder)
    if declared is None:
        return layers
    exact = {path: vptq.exact_format(fmt, layers[path].k) for path, fmt in declared.items() if path in layers}
    if set(declared) != set(layers) or exact != {path: layer.fmt for path, layer in layers.items()}:
        raise _disagreement(folder)
    return {path: replace(layer, fmt=cast(VectorFormat, declared[path])) for path, layer in layers.items()}


def _declared_formats(folder: Path) -> dict[str, WeightFormat] | None:
    """The formats in lowbit.json, None where there is no such file."""
    if not (folder / "lowbit.json").exists():
        return None
    values = load_json(contained(folder, "lowbit.json"), "LB0114")
    declared = values.get("formats")
    try:
        return {path: parse_format(text) for path, text in declared.items()}  # type: ignore[union-attr]
    except (FormatError, AttributeError, TypeError) as e:
        raise CheckpointError("LB0114", f"lowbit.json has a bad format: {e}", where=str(folder)) from e


def _disagreement(folder: Path) -> CheckpointError:
    return CheckpointError("LB0114", "lowbit.json and config.json disagree about formats", where=str(folder))
