"""Quantized checkpoints as models on lowbit's kernels, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io import compressed_tensors as ct
from lowbit.compiler.io import ct_floats, native, vptq, vptq_tensors
from lowbit.compiler.io.checkpoint import Checkpoint, checkpoint_layout, read_checkpoint
from lowbit.compiler.io.expert_tensors import StackedSlice, stacked_slices
from lowbit.compiler.io.source import check_depth, skeleton
from lowbit.compiler.io.write import Blob, Part, staged_folder, write_json, write_shards
from lowbit.compiler.runtime.experts import expert_layers, prepare_experts
from lowbit.compiler.runtime.fused import QuantGatedMLP, SiblingLinear
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.compiler.runtime.prebuilt import use_kernels
from lowbit.quantizers.formats import WeightFormat
from lowbit.quantizers.weights import QWeight, stored_names

__all__ = ["FormattedLinear", "load_quantized", "module_formats", "module_inputs", "save_quantized", "skeleton_of"]

_MARGIN = 20_000_000


def load_quantized(
    folder: str | Path, *, dtype: torch.dtype | None = None, trust_kernels: bool | None = None
) -> nn.Module:
    """The causal LM of a quantized checkpoint, with its quantized layers on lowbit's kernels, in eval mode.

    Reads what `read_checkpoint` does: checkpoints of lowbit, compressed-tensors, GPTQ, AWQ, AQLM, VPTQ, bitsandbytes
    and FP8 in blocks, and GGUF files. Weights stay quantized, one layer is unpacked at a time. dtype: of everything
    else, the config's when None. Raises CheckpointError as `read_checkpoint`, and LB0114 when tensors and architecture
    do not fit. trust_kernels: whether kernels compiled into the checkpoint, which are code, may run; see
    `runtime.prebuilt.use_kernels`.
    """
    checkpoint = read_checkpoint(folder)
    use_kernels(checkpoint.folder, trust_kernels)
    config = _base_config(checkpoint)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    model = skeleton(config, dtype)
    _assign_plain(model, checkpoint, dtype)
    _swap_layers(model, checkpoint, dtype)
    model.tie_weights()  # type: ignore[operator]
    prepare_experts(model)
    empty = [name for name, p in [*model.named_parameters(), *model.named_buffers()] if p.device.type == "meta"]
    if empty:
        raise CheckpointError("LB0114", f"no tensor for {', '.join(empty[:3])}", where=str(checkpoint.folder))
    _set_generation_config(model, checkpoint.folder)
    if checkpoint.kv:
        model.kv_format = checkpoint.kv  # type: ignore[assignment]
    describe(model)
    return model.requires_grad_(False).eval()


class FormattedLinear(nn.Linear):
    """A linear layer of a checkpoint whose weights are not read: for its shape, its format, and what it does to its
    input."""

    def __init__(self, like: nn.Linear, fmt: WeightFormat, given: native.StoredInput) -> None:
        bias = like.bias is not None
        super().__init__(like.in_features, like.out_features, bias, device="meta", dtype=like.weight.dtype)
        self.fmt, self.given = fmt, given

    def asks(self) -> dict[str, str | int]:
        """As `QuantLinear.asks`, without what only the weights show."""
        return self.given.to_dict()


def skeleton_of(checkpoint: Checkpoint) -> nn.Module:
    """The modules of a quantized checkpoint without their weights, which are not read; errors as `load_quantized`."""
    config = _base_config(checkpoint)
    model = skeleton(config, getattr(config, "dtype", None) or torch.float32)
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    for path, fmt in checkpoint.modules.items():
        if (old := linears.get(path)) is None:
            raise CheckpointError("LB0114", "the model has no such linear layer", where=f"{checkpoint.folder}: {path}")
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, FormattedLinear(old, fmt, checkpoint.layer_input(path)))
    return model


def _base_config(checkpoint: Checkpoint) -> Any:
    """The config without its quantization, so that transformers builds the plain architecture."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = {k: v for k, v in checkpoint.config.items() if k not in ("quantization_config", "auto_map")}
    try:
        config = CONFIG_MAPPING[values.get("model_type")].from_dict(values)
    except Exception as e:  # config classes validate themselves with errors of many kinds
        why = f"transformers cannot read config.json: {str(e)[:200]}"
        raise CheckpointError("LB0108", why, where=str(checkpoint.folder)) from e
    check_depth(config, len(checkpoint.plain_names()) + len(checkpoint.modules), str(checkpoint.folder))
    return config


def _swap_layers(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Put a prepared QuantLinear in the place of every quantized layer, one at a time."""
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear)}
    for path in checkpoint.modules:
        where, old = f"{checkpoint.folder}: {path}", linears.get(path)
        if old is None:
            raise CheckpointError("LB0114", "the model has no such linear layer", where=where)
        q = checkpoint.qtensor(path)
        if q.shape != (old.out_features, old.in_features):
            why = f"is {list(q.shape)}, the config asks for {[old.out_features, old.in_features]}"
            raise CheckpointError("LB0114", why, where=where)
        bias = checkpoint.tensor(f"{path}.bias").to(dtype) if old.bias is not None else None
        parent, _, name = path.rpartition(".")
        given = checkpoint.layer_input(path)
        layer = QuantLinear.from_qtensor(
            q, bias, activation=given.activation, input_scale=given.scale, rotate=given.rotate
        )
        setattr(model.get_submodule(parent), name, layer)


def _assign_plain(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    """Read every tensor that belongs to no quantized weight into the model, one at a time, before layers are swapped.

    (The state dict of a model with quantized layers would unpack them all.)
    """
    state = model.state_dict(keep_vars=True)
    for name, value in _plain_tensors(model, checkpoint, set(state)):
        if value.shape != state[name].shape:
            why = f"is {list(value.shape)}, the config asks for {list(state[name].shape)}"
            raise CheckpointError("LB0114", why, where=f"{checkpoint.folder}: {name}")
        value = value.to(dtype) if value.is_floating_point() else value
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        if leaf in module._parameters:
            module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[leaf] = value


def _plain_tensors(model: nn.Module, checkpoint: Checkpoint, wanted: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Stored tensors of the model, one at a time; those that stack float experts are taken apart."""
    slices: dict[str, dict[str, StackedSlice]] = {}
    for name, piece in stacked_slices(model).items():
        slices.setdefault(piece.stack, {})[name] = piece
    for name in checkpoint.plain_names():
        if name in wanted:
            yield name, checkpoint.tensor(name)
        elif name in slices:
            stack = checkpoint.tensor(name)
            for layer, piece in slices[name].items():
                yield layer, piece.of(stack[piece.expert])


def _set_generation_config(model: nn.Module, folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def module_formats(model: nn.Module) -> dict[str, WeightFormat]:
    """Format by module path of every quantized layer, fused ones included."""
    return {path: fmt for path, (fmt, _) in _layers(model).items()}


def _layers(model: nn.Module) -> dict[str, tuple[WeightFormat, tuple[int, int]]]:
    """(format, (N, K)) by module path of every quantized layer."""
    found: dict[str, tuple[WeightFormat, tuple[int, int]]] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found[path] = (module.fmt, (module.out_features, module.in_features))
        elif isinstance(module, SiblingLinear):
            found[path] = (module._shared.packed.packed().fmt, (module.out_features, module.in_features))
        elif isinstance(module, QuantGatedMLP):
            packed = module.gate_up.packed()
            for name, n in zip(module._names, packed.segments, strict=False):
                found[f"{path}.{name}"] = (packed.fmt, (n, packed.k))
    return found


def module_inputs(model: nn.Module) -> dict[str, native.StoredInput]:
    """What every quantized layer does to its input, by module path, fused ones included."""
    found: dict[str, native.StoredInput] = {}
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear):
            found[path] = native.StoredInput(module.activation, module.rotate)
        elif isinstance(module, SiblingLinear):
            found[path] = native.StoredInput(module.shared.activation, module.shared.rotate)
        elif isinstance(module, QuantGatedMLP):
            own = native.StoredInput(module.gate_up.activation, module.gate_up.rotate)
            found |= {f"{path}.{name}": own for name in module._names[:2]}
    return found


def describe(model: nn.Module) -> None:
    """Set the config of a model with quantized layers, so that `save_pretrained` writes what it is.

    `save_pretrained` writes lowbit's own tensors, so vector formats get the native config there; VPTQ's layout, which
    has other tensors, is written by `save_quantized`.
    """
    from lowbit.compiler.io import hf_config

    config: Any = model.config
    config.quantization_config = _quantization_config(model)
    if expert_layers(model):
        model._weight_conversions = []  # type: ignore[assignment]  # what is saved keeps the names of the modules
    config.__class__ = hf_config.guarded(config.__class__)


def _quantization_config(model: nn.Module) -> dict[str, Any]:
    formats = module_formats(model)
    if _layout(model) != "compressed-tensors" or _floats(model):
        more = (getattr(model, "kv_format", ""), bool(expert_layers(model)))
        return native.quantization_config(formats, module_inputs(model), *more)
    return ct.quantization_config(formats, _kept_linears(model))


def _floats(model: nn.Module) -> bool:
    """Whether compressed-tensors holds the layers in its layouts of small floats, whose tensors are not lowbit's."""
    return any(ct_floats.layout_of(fmt) for fmt in module_formats(model).values())


def _layout(model: nn.Module) -> str:
    layers = _layers(model)
    formats = {path: fmt for path, (fmt, _) in layers.items()}
    if any(given.to_dict() for given in module_inputs(model).values()):
        return "lowbit"
    shapes = {path: shape for path, (_, shape) in layers.items()}
    return checkpoint_layout(formats, shapes, experts=bool(expert_layers(model)))


def _kept_linears(model: nn.Module) -> set[str]:
    """Paths of the linear layers that are not quantized."""
    kept = {path for path, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)}
    return kept - set(module_formats(model))


def save_quantized(model: nn.Module, folder: str | Path, *, tokenizer: Any = None) -> Path:
    """Write a model with quantized layers (compiled or not) as a checkpoint that `load_quantized` reads.

    The folder appears complete or not at all. Raises CheckpointError: LB0110 `folder` is not empty, LB0111 disk full,
    LB0114 the model has no quantized layers, LB0115 not writable.
    """
    if not module_formats(model):
        raise CheckpointError("LB0114", "the model has no quantized layers", hint="call lowbit.quantize first")
    if getattr(model, "config", None) is None:
        hint = "keep its state_dict() with torch.save or safetensors, and load it into the same quantized modules"
        raise CheckpointError("LB0105", f"a {type(model).__name__} has no config of transformers to save", hint=hint)
    describe(model)
    state, layout = _state(model), _layout(model)
    by_vptq, by_floats = layout == "vptq", layout == "compressed-tensors" and _floats(model)
    if by_vptq or by_floats:
        state = _their_state(model, state, vptq_tensors.to_tensors if by_vptq else ct_floats.to_tensors)
    parts = [_part(name, tensor) for name, tensor in state.items()]
    needed = sum(part.nbytes for part in parts) + _MARGIN
    config: Any = model.config
    values = config.to_diff_dict()
    if by_vptq:
        values = {**native.unguard(values), "quantization_config": _vptq_config(model, set(state))}
    if by_floats:
        own = ct.quantization_config(module_formats(model), _kept_linears(model))
        values = {**native.unguard(values), "quantization_config": own}
    values["architectures"] = [type(model).__name__]
    values["dtype"] = str(next(p.dtype for p in model.parameters())).removeprefix("torch.")
    with staged_folder(Path(folder), needed) as stage:
        write_shards(stage, parts, 2_000_000_000)
        if values.get("model_type") == "lowbit":
            values = native.guard(native.unguard(values), auto_map=True)
            (stage / native.CONFIG_FILE).write_text(native.CONFIG_SOURCE, encoding="utf-8")
        write_json(stage / "config.json", values)
        if getattr(model, "generation_config", None) is not None:
            cast(Any, model.generation_config).save_pretrained(stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
    return Path(folder)


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with tied tensors once, under their first name."""
    once: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        once.setdefault(id(tensor), name)
    return {name: state[name].detach() for name in once.values()}


def _part(name: str, tensor: torch.Tensor) -> Part:
    return Part((Blob(name, tensor.dtype, tuple(tensor.shape)),), lambda: {name: tensor})


def _vptq_config(model: nn.Module, names: set[str]) -> dict[str, Any]:
    layers = _layers(model)
    formats = {path: fmt for path, (fmt, _) in layers.items()}
    biased = {path for path in formats if f"{path}.bias" in names}
    shapes = {path: shape for path, (_, shape) in layers.items()}
    return vptq.quantization_config(formats, shapes, biased, _kept_linears(model))


def _their_state(
    model: nn.Module, state: dict[str, torch.Tensor], to_tensors: Callable[[QWeight], dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """`state` with the tensors of quantized layers in another program's form instead of lowbit's."""
    state = dict(state)
    for path, fmt in module_formats(model).items():
        ours = {name: state.pop(f"{path}.{name}").cpu() for name in stored_names(fmt)}
        theirs = to_tensors(ct.from_tensors(fmt, ours, path))
        state |= {f"{path}.{name}": tensor for name, tensor in theirs.items()}
    return state
