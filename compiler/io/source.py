"""Opening the model to quantize: a folder, a GGUF file or a hub id, all seen as a `ModelSource`.

Nothing in a model folder is trusted: no pickle is loaded, no code in it is run, and no file outside it is opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbit.compiler.errors import CheckpointError

__all__ = [
    "Licence",
    "ModelSource",
    "check_causal_lm",
    "check_depth",
    "expected_tensors",
    "file_digest",
    "is_gguf",
    "open_model",
    "skeleton",
]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class Licence:
    """What a model may be used for: `name` as model cards write it (`apache-2.0`), `text` when a file has it."""

    name: str | None = None
    text: str | None = None


class ModelSource(ABC):
    """A causal language model whose tensors are read one at a time.

    config: the transformers config. origin: the hub id or file name a card can name. base_model: hub id of the
    original model when known. notes: what a user should know about how it is read. kept_dtype: the dtype in which
    matrices that are not quantized are stored by an export, where that is not their own. Tensor names are those of the
    model's state dict; tied tensors occur once.
    """

    config: Any
    origin: str
    base_model: str | None = None
    notes: tuple[str, ...] = ()
    kept_dtype: torch.dtype | None = None
    licence: Licence = Licence()

    @abstractmethod
    def names(self) -> list[str]:
        """Names of all tensors, in the order of the model's state dict."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, without reading it."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor into memory."""

    @abstractmethod
    def extras(self) -> list[Path]:
        """Files to carry along: tokenizer, generation config, chat template, licence."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The transformers tokenizer; raises CheckpointError (LB0117) when the model has none."""

    @abstractmethod
    def digest(self) -> str:
        """Cheap identity of the model: file names, sizes, headers and samples of the data (not a full checksum)."""

    def empty_model(self) -> nn.Module:
        """The model without weights: parameters on the meta device, non-parameter buffers computed (see `skeleton`)."""
        return skeleton(self.config)

    def nbytes(self) -> int:
        """Bytes of all tensors in the dtypes they are stored in."""
        return sum(torch.Size(self.shape(n)).numel() * self.dtype(n).itemsize for n in self.names())


def open_model(model: str | Path) -> ModelSource:
    """Open a model: a folder with config.json and safetensors, a `.gguf` file, or a hub id `owner/name`.

    Raises CheckpointError: LB0101 nothing there, LB0102 broken file, LB0103 bad shard index, LB0104 hub not reachable,
    LB0105 not a causal language model, LB0106 no safetensors, LB0108 bad config.json, LB0109 GGUF not readable, LB0112
    tensors do not fit the architecture, LB0116 already quantized.
    """
    from lowbit.compiler.io.source_folder import FolderSource
    from lowbit.compiler.io.source_gguf import GGUFSource

    path = Path(model).expanduser()
    if path.is_dir():
        return FolderSource(path)
    if path.is_file():
        if is_gguf(path):
            return GGUFSource(path)
        raise CheckpointError(
            "LB0101", "is neither a model folder nor a GGUF file", where=str(path), hint="give the folder it lies in"
        )
    if isinstance(model, str) and _HUB_ID.fullmatch(model) and path.suffix != ".gguf":
        return FolderSource(_download(model), origin=model)
    raise CheckpointError(
        "LB0101", "no such file or folder", where=str(model), hint="give a model folder, a .gguf file or a hub id"
    )


def is_gguf(path: Path) -> bool:
    """Whether `path` is a file that is called GGUF, or begins as one does."""
    if not path.is_file() or path.suffix == ".gguf":
        return path.is_file()
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _download(model: str) -> Path:
    """Folder of the hub model's snapshot: safetensors, configs and tokenizer files only, never pickles or code."""
    from huggingface_hub import snapshot_download

    patterns = [
        "*.safetensors",
        "*.json",
        "*.jinja",
        "*.txt",
        "*.model",
        "*.tiktoken",
        "LICENSE*",
        "NOTICE*",
        "README.md",
    ]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as e:  # the hub client raises a dozen kinds; to the user they are one
        raise CheckpointError(
            "LB0104",
            f"is not a folder here, and could not be fetched from the hub: {type(e).__name__}: {_first_line(e)}",
            where=model,
            hint="check the name and the network, or download it and give the folder",
        ) from e


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else "no details"


def check_causal_lm(config: Any, where: str) -> None:
    """Raise CheckpointError: LB0105 when transformers has no causal LM for `config`, LB0116 when it is quantized."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    classes = [c for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for c in _as_tuple(value)]
    declared = _as_tuple(getattr(config, "architectures", None) or ())
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or (declared and not set(declared) & set(classes)):
        shown = ", ".join(map(str, declared)) or f"model type {getattr(config, 'model_type', None)!r}"
        raise CheckpointError(
            "LB0105", f"{shown} is not a causal language model", where=where, hint="quantize a text-generation model"
        )
    quantized = getattr(config, "quantization_config", None)
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else type(quantized).__name__
        raise CheckpointError(
            "LB0116", f"the model is already quantized ({method})", where=where, hint="start from the original model"
        )


def check_depth(config: Any, tensors: int, where: str) -> None:
    """Raise CheckpointError (LB0112) for more layers than the files have tensors, before every layer is built."""
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > tensors:
        why = f"config.json asks for {layers:,} layers, and the files have {tensors} tensors"
        raise CheckpointError("LB0112", why, where=where, hint="check that config.json belongs to these weights")


def _as_tuple(value: Any) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (str(value),)


def skeleton(config: Any, dtype: torch.dtype | None = None, *, unstack: bool = True) -> nn.Module:
    """The causal LM of `config` in eval mode: parameters on the meta device, buffers (rotary tables ...) computed.

    Real buffers matter: non-persistent ones are in no checkpoint, so a model built entirely on the meta device has
    nothing to fill them from. unstack: experts are linear layers (`runtime.experts`), not the stacked parameters that
    transformers has.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from lowbit.compiler.runtime.experts import unstack_experts

    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    try:
        with _parameters_on_meta(), no_init_weights():
            model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as e:  # models look values up, divide and multiply sizes: whatever goes wrong, config.json says it
        why = f"transformers cannot build the model of config.json: {type(e).__name__}: {_first_line(e)}"
        where = str(getattr(config, "_name_or_path", "")) or type(config).__name__
        raise CheckpointError("LB0108", why, where=where) from e
    model.tie_weights()  # type: ignore[operator]
    if unstack:
        unstack_experts(model)
    return model.eval()


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters registered inside go to the meta device; their memory is never touched."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def expected_tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes a checkpoint of `model` must have: its state dict, tied tensors once, under the first name."""
    seen: set[int] = set()
    names = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            names[name] = tuple(tensor.shape)
    return names


def file_digest(path: Path) -> str:
    """SHA-256 over the file's name, size, and 64 evenly spaced blocks: finds another file, not every changed bit."""
    digest, size = hashlib.sha256(), path.stat().st_size
    digest.update(f"{path.name}\0{size}\0".encode())
    step = max(_SAMPLE_BYTES, size // _SAMPLES)
    with path.open("rb") as file:
        for start in [*range(0, size, step), max(0, size - _SAMPLE_BYTES)]:
            file.seek(start)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
