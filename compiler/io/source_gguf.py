"""A GGUF file as a model: transformers maps names, config and tokenizer; tensors are dequantized on request."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.expert_tensors import unstack_tensors
from lowbit.compiler.io.source import Licence, ModelSource, check_causal_lm, expected_tensors, file_digest, skeleton

__all__ = ["GGUFSource", "RawTensor"]

_ONE_TO_ONE = {"TensorProcessor", "LlamaTensorProcessor", "Gemma2TensorProcessor", "NemotronTensorProcessor"}
"""transformers' per-architecture fix-ups that turn one GGUF tensor into one model tensor. Others split or merge tensors
(experts), so for those the whole state dict is read at once."""


@dataclass(frozen=True, eq=False)
class RawTensor:
    """A matrix in blocks, as the file has it. kind: name of its type; rows: uint8 [N, bytes of a row], mapped; order:
    the row of the file that each row of the model is."""

    kind: str
    rows: np.ndarray[Any, Any]
    order: np.ndarray[Any, Any]

    def read(self) -> torch.Tensor:
        """uint8 [N, bytes of a row], rows in the model's order, in memory of its own."""
        return torch.from_numpy(self.rows[self.order])


class GGUFSource(ModelSource):
    """Weights of a GGUF file, as float32. Raises CheckpointError: LB0109, or as `open_model`."""

    # Numbers of 8 bits and less times float16 scales: float16 holds them to 2**-11, in half the bytes.
    kept_dtype = torch.float16

    def __init__(self, path: Path) -> None:
        self.path, self.origin = path, path.name
        self._reader = _open(path)
        self.config = self._guard(self._load_config)
        self.config.dtype = torch.float32
        check_causal_lm(self.config, str(path))
        model = self.empty_model()
        self.config.architectures = [type(model).__name__]
        self.licence = Licence(self._field("general.license"))
        self.base_model = _hub_id(self._field("general.base_model.0.repo_url"))
        self._shapes = expected_tensors(model)
        self._raw: dict[str, RawTensor] | None = None
        self._load: dict[str, Callable[[], torch.Tensor]] = self._guard(lambda: self._plan(model))
        missing = [name for name in self._shapes if name not in self._load]
        if missing:
            raise CheckpointError("LB0112", f"no tensor for {', '.join(missing[:3])}", where=str(path))
        self._extras: tempfile.TemporaryDirectory[str] | None = None

    def _guard(self, read: Callable[[], Any]) -> Any:
        """Run `read`; whatever transformers or gguf raise on a file they cannot use becomes LB0109."""
        try:
            return read()
        except CheckpointError:
            raise
        except Exception as e:
            why = f"transformers cannot read this GGUF file: {type(e).__name__}: {str(e)[:200]}"
            raise CheckpointError("LB0109", why, where=str(self.path)) from e

    def _load_config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.path.parent, gguf_file=self.path.name, local_files_only=True)

    def _field(self, key: str) -> str | None:
        field = self._reader.fields.get(key)
        value = field.contents() if field is not None else None
        return value if isinstance(value, str) else None

    def _plan(self, model: torch.nn.Module) -> dict[str, Callable[[], torch.Tensor]]:
        """Model tensor name -> how to read it."""
        from transformers import modeling_gguf_pytorch_utils as hf

        parsed = {key: getattr(self.config, key, None) for key in ("num_attention_heads", "num_key_value_heads")}
        cls = hf.TENSOR_PROCESSORS.get(self._field("general.architecture"), hf.TensorProcessor)
        if cls.__name__ not in _ONE_TO_ONE:
            plain = skeleton(self.config, unstack=False)  # transformers looks for its own names
            state = hf.load_gguf_checkpoint(str(self.path), return_tensors=True, model_to_load=plain)["tensors"]
            state = unstack_tensors(state, model)
            self.notes = ("the whole model is held in memory as float32 (this architecture's tensors are regrouped)",)
            return {name: partial(tensor.to, torch.float32) for name, tensor in state.items()}
        self.notes = ("weights are dequantized from GGUF to float32, one tensor at a time",)
        processor = cls(config=parsed)
        names = hf.get_gguf_hf_weights_map(_Names(model, depth=1), processor)
        mine = {names[t.name]: t for t in self._reader.tensors if t.name in names}
        self._raw = {name: _raw(t, processor) for name, t in mine.items() if _in_blocks(t)}
        return {name: partial(self._dequantize, t, processor) for name, t in mine.items()}

    def raw_tensors(self) -> dict[str, RawTensor] | None:
        """The matrices that are in blocks, by the model's names; None for an architecture whose tensors are
        regrouped."""
        return self._raw

    def _dequantize(self, tensor: Any, processor: Any) -> torch.Tensor:
        import gguf

        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        values = processor.process(values, tensor.name, tensor_key_mapping={}, parsed_parameters={}).weights
        # The file is memory-mapped read-only: float tensors come back as views of it.
        return torch.from_numpy(np.array(values, dtype=np.float32, order="C"))

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def tensor(self, name: str) -> torch.Tensor:
        value: torch.Tensor = self._guard(self._load[name])
        if tuple(value.shape) != self._shapes[name]:
            why = f"tensor {name} is {list(value.shape)}, the config asks for {list(self._shapes[name])}"
            raise CheckpointError("LB0112", why, where=str(self.path))
        return value

    def extras(self) -> list[Path]:
        if self._extras is None:
            self._extras = tempfile.TemporaryDirectory(prefix="lowbit-gguf-")
            folder = Path(self._extras.name)
            self.tokenizer().save_pretrained(folder)
            self._guard(lambda: self._generation_config().save_pretrained(folder))
        return sorted(p for p in Path(self._extras.name).rglob("*") if p.is_file())

    def _generation_config(self) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig.from_model_config(self.config)

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name, local_files_only=True)
        except Exception as e:
            raise CheckpointError("LB0117", f"no usable tokenizer: {str(e)[:200]}", where=str(self.path)) from e

    def digest(self) -> str:
        return hashlib.sha256(file_digest(self.path).encode()).hexdigest()


class _Names:
    """A module of which transformers sees the names of tensors, and its own modules to a depth. It looks names up anew
    for every module, which takes a second per hundred; those that GGUF has begin at the model or one level below."""

    def __init__(self, module: torch.nn.Module, depth: int) -> None:
        self._module, self._depth = module, depth
        self.config = getattr(module, "config", None)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """By name."""
        return self._module.state_dict()

    def named_children(self) -> list[tuple[str, _Names]]:
        """The modules in it, empty at the last level."""
        children = self._module.named_children() if self._depth else ()
        return [(name, _Names(child, self._depth - 1)) for name, child in children]


def _in_blocks(tensor: Any) -> bool:
    """Whether a tensor of a file is a matrix whose numbers share scales."""
    import gguf

    columns: int = gguf.GGML_QUANT_SIZES[tensor.tensor_type][0]
    return columns > 1 and tensor.data.ndim == 2


def _raw(tensor: Any, processor: Any) -> RawTensor:
    """A matrix, with the order in which transformers puts its rows: what becomes of their numbers."""
    rows = np.arange(tensor.data.shape[0])[:, None]
    order = processor.process(rows, tensor.name, tensor_key_mapping={}, parsed_parameters={}).weights[:, 0]
    return RawTensor(tensor.tensor_type.name, tensor.data, order)


def _open(path: Path) -> Any:
    """A gguf reader, after checking that every tensor lies inside the file."""
    try:
        import gguf
    except ImportError as e:
        raise CheckpointError(
            "LB0109", "reading GGUF needs the gguf package", where=str(path), hint="pip install 'lowbit[gguf]'"
        ) from e
    try:
        reader = gguf.GGUFReader(path)
    except Exception as e:  # the reader indexes a memory map and fails in many ways on a broken file
        why = f"not a valid GGUF file ({path.stat().st_size} bytes): {type(e).__name__}: {str(e)[:200]}"
        raise CheckpointError("LB0109", why, where=str(path), hint="fetch the file again") from e
    split = reader.fields.get("split.count")
    if split is not None and int(split.contents()) > 1:
        why, hint = f"is one of {split.contents()} files of a model", "join them with `llama-gguf-split --merge`"
        raise CheckpointError("LB0109", why, where=str(path), hint=hint)
    size = path.stat().st_size
    for tensor in reader.tensors:
        end = int(tensor.data_offset) + int(tensor.n_bytes)
        if end > size:
            why = f"truncated: tensor {tensor.name!r} ends at byte {end}, the file has {size}"
            raise CheckpointError("LB0109", why, where=str(path), hint="fetch the file again")
    return reader


def _hub_id(url: str | None) -> str | None:
    prefix = "https://huggingface.co/"
    return url.removeprefix(prefix) if url and url.startswith(prefix) and url.count("/") == 4 else None
