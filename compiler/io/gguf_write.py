"""Writing a quantized checkpoint as one GGUF file, for llama.cpp and for transformers' `gguf_file`.

Codes and scales are moved as they are (`gguf_types`); what is not quantized keeps its type, except that vectors become
float32, as llama.cpp wants. One tensor is in memory at a time. What GGUF cannot hold is refused before anything is
written.
"""

from __future__ import annotations

import importlib.metadata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.compiler.io.checkpoint import Checkpoint
from lowbit.compiler.io.gguf_model import ARCHITECTURES, add_model, check_model, check_model_type
from lowbit.compiler.io.gguf_tensors import PlannedTensor, check_layers, gguf_member, gguf_package, planned_tensors
from lowbit.compiler.io.gguf_tokenizer import Vocabulary, read_vocabulary
from lowbit.compiler.io.gguf_types import BLOCK, BLOCK_BYTES
from lowbit.compiler.io.load import skeleton_of
from lowbit.compiler.io.source import expected_tensors
from lowbit.compiler.io.source_folder import contained, find_licence, front_matter, load_json
from lowbit.compiler.io.write import staged_file

__all__ = ["write_gguf"]

_FILE_TYPES = {"MXFP4": "MOSTLY_MXFP4_MOE"}
"""llama.cpp's name of a file by the type of most of its numbers, where that is not MOSTLY_ and the type's."""
_MARGIN = 1_000_000
_HUB = "https://huggingface.co/"


def write_gguf(checkpoint: Checkpoint, out: Path) -> Path:
    """Write `checkpoint` to the GGUF file `out`, with its tokenizer; gives the file's path.

    The file appears complete or not at all. Raises CheckpointError: LB0109 the package gguf is missing or too old,
    LB0110 `out` exists, LB0111 disk full, LB0114 the checkpoint contradicts itself, LB0115 not writable, LB0117 no
    usable tokenizer, LB0123 a model, layers or a tokenizer that GGUF cannot hold; others as `Checkpoint.qtensor`.
    """
    gguf_package(str(out))
    where = str(checkpoint.folder)
    check_model_type(checkpoint.config.get("model_type"), where)
    model = skeleton_of(checkpoint)
    config: Any = model.config
    check_model(config, where)
    shapes = expected_tensors(model)
    check_layers(checkpoint, shapes)
    tensors = list(planned_tensors(checkpoint, config, shapes))
    vocabulary = read_vocabulary(checkpoint.folder, config.vocab_size)
    sizes = sum(tensor.nbytes + BLOCK for tensor in tensors)
    texts = sum(len(text.encode()) + 16 for text in [*vocabulary.tokens, *vocabulary.merges])
    with staged_file(out, sizes + texts + _MARGIN) as stage:
        _write(stage, checkpoint, config, vocabulary, tensors)
    return out


def _write(
    stage: Path, checkpoint: Checkpoint, config: Any, vocabulary: Vocabulary, tensors: list[PlannedTensor]
) -> None:
    gguf = gguf_package(str(stage))
    writer = gguf.GGUFWriter(stage, ARCHITECTURES[config.model_type])
    try:
        _add_origin(writer, checkpoint)
        add_model(writer, config)
        _add_file_type(writer, tensors)
        vocabulary.write(writer)
        for tensor in tensors:
            kind = gguf_member(gguf.GGMLQuantizationType, tensor.kind)
            writer.add_tensor_info(tensor.name, tensor.row, np.dtype(np.uint8), tensor.nbytes, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_data(writer, tensors)
    finally:
        writer.close()


def _write_data(writer: Any, tensors: list[PlannedTensor]) -> None:
    """Not by `write_tensor_data`: numpy's `tofile`, which it calls, does not say why a disk takes no more."""
    (file,) = writer.fout
    writer.write_padding(file, file.tell())
    for tensor in tensors:
        data = tensor.load()
        assert tuple(data.shape) == tensor.row, tensor.name
        file.write(data.numpy().data)
        writer.write_padding(file, data.numel())


def _add_origin(writer: Any, checkpoint: Checkpoint) -> None:
    """Who made the file of what: names, the licence, formats."""
    folder = checkpoint.folder
    card, made = front_matter(folder), {}
    if (folder / "lowbit.json").exists():
        made = load_json(contained(folder, "lowbit.json"), "LB0114")
    source, base = made.get("source"), card.get("base_model")
    name = base or (source.get("model") if isinstance(source, dict) else None) or folder.resolve().name
    writer.add_type("model")
    writer.add_name(str(name).rpartition("/")[2])
    if base and base.count("/") == 1:
        organization, _, model = base.partition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, model)
        writer.add_base_model_organization(0, organization)
        writer.add_base_model_repo_url(0, _HUB + base)
    if licence := find_licence(folder, card.get("license")).name:
        writer.add_license(licence)
    writer.add_quantized_by(f"lowbit {importlib.metadata.version('lowbit')}")
    writer.add_string("lowbit.formats", ", ".join(sorted({str(fmt) for fmt in checkpoint.modules.values()})))


def _add_file_type(writer: Any, tensors: list[PlannedTensor]) -> None:
    """The type of most numbers in blocks, and the version of all block types."""
    gguf = gguf_package("")
    counts: Counter[str] = Counter()
    for tensor in tensors:
        counts[tensor.kind] += tensor.size * (tensor.kind in BLOCK_BYTES)
    kind = counts.most_common(1)[0][0]
    writer.add_file_type(gguf_member(gguf.LlamaFileType, _FILE_TYPES.get(kind, f"MOSTLY_{kind}")))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
