"""A model folder: config.json and one or more safetensors files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.expert_tensors import StackedSlice, fits, names_in_files, stacked_slices
from lowbit.compiler.io.safetensors_file import SafetensorsFile
from lowbit.compiler.io.source import (
    Licence,
    ModelSource,
    check_causal_lm,
    check_depth,
    expected_tensors,
    file_digest,
)

__all__ = [
    "FolderSource",
    "carried_files",
    "contained",
    "find_licence",
    "folder_digest",
    "front_matter",
    "load_json",
    "open_shards",
]

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_JSON = 256_000_000
_EXTRAS = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model", "*.tiktoken",
    "generation_config.json", "chat_template*", "additional_chat_templates/*.jinja", "LICENSE*", "LICENCE*", "NOTICE*",
    "USE_POLICY*",
)  # fmt: skip


def contained(folder: Path, name: str) -> Path:
    """The file `name` of a model folder; raises CheckpointError (LB0103) when it would lie outside the folder.

    `name` comes from an index file, so it is hostile until shown otherwise: plain relative names only, and no link
    that leaves the folder. The one exception is the hub cache, whose snapshots link to the blobs beside them.
    """
    pure = PurePosixPath(name)
    plain = name and "\0" not in name and "\\" not in name and ":" not in name
    if (
        not plain
        or not pure.parts
        or pure.is_absolute()
        or any(part in ("..", "~") for part in pure.parts)
        or str(pure) != name
    ):
        raise _hostile(folder, f"{name[:200]!r} is not a plain file name")
    root = folder.resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(_trusted_root(root)):
        raise _hostile(folder, f"{name[:200]!r} is a link that leaves the folder", "copy the file into the folder")
    return path


def _hostile(folder: Path, why: str, hint: str = "fetch the model again") -> CheckpointError:
    return CheckpointError("LB0103", why, where=str(folder), hint=hint)


def _trusted_root(root: Path) -> Path:
    cache = root.parent.parent
    is_snapshot = root.parent.name == "snapshots" and cache.name.startswith("models--") and (cache / "blobs").is_dir()
    return cache if is_snapshot else root


def load_json(path: Path, code: str) -> dict[str, Any]:
    """A JSON object from a file of at most 256 MB; raises CheckpointError with `code`."""
    try:
        if path.stat().st_size > _MAX_JSON:
            raise CheckpointError(code, f"larger than {_MAX_JSON} bytes", where=str(path))
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(code, f"cannot be read as JSON: {str(e)[:200]}", where=str(path)) from e
    if not isinstance(values, dict):
        raise CheckpointError(code, "must be a JSON object", where=str(path))
    return values


def open_shards(folder: Path) -> dict[str, SafetensorsFile]:
    """Tensor name -> validated file that holds it, for a folder with one safetensors file or an index.

    Raises CheckpointError: LB0102 broken file, LB0103 bad index, LB0106 no safetensors.
    """
    if (folder / _INDEX).exists():
        return _open_indexed(folder)
    if not (folder / _SINGLE).exists():
        raise _no_weights(folder)
    file = SafetensorsFile(contained(folder, _SINGLE))
    return dict.fromkeys(file.header.tensors, file)


def _no_weights(folder: Path) -> CheckpointError:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles:
        return CheckpointError(
            "LB0106",
            f"has only pickled weights ({pickles[0]}), which can run code when loaded",
            where=str(folder),
            hint="convert them to safetensors first, for example with transformers' save_pretrained",
        )
    return CheckpointError("LB0106", f"has neither {_SINGLE} nor {_INDEX}", where=str(folder))


def _open_indexed(folder: Path) -> dict[str, SafetensorsFile]:
    where = folder / _INDEX
    weight_map = load_json(contained(folder, _INDEX), "LB0103").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("LB0103", "has no weight_map", where=str(where))
    if not all(isinstance(file, str) and file.endswith(".safetensors") for file in weight_map.values()):
        raise CheckpointError("LB0103", "weight_map must name .safetensors files", where=str(where))
    files = {name: _shard(folder, name) for name in sorted(set(weight_map.values()))}
    owners: dict[str, str] = {}
    for shard, file in files.items():
        for tensor in file.header.tensors:
            if tensor in owners:
                raise CheckpointError(
                    "LB0103", f"tensor {tensor[:200]!r} is in {owners[tensor]} and {shard}", where=str(where)
                )
            owners[tensor] = shard
    for tensor, shard in weight_map.items():
        if owners.get(tensor) != shard:
            actual = f"is in {owners[tensor]}" if tensor in owners else "is in no shard"
            raise CheckpointError(
                "LB0103", f"tensor {tensor[:200]!r} should be in {shard} but {actual}", where=str(where)
            )
    return {tensor: files[shard] for tensor, shard in weight_map.items()}


def _shard(folder: Path, name: str) -> SafetensorsFile:
    path = contained(folder, name)
    if not path.is_file():
        raise CheckpointError(
            "LB0103", f"shard {name} is missing", where=str(folder), hint="fetch the model again; the index names it"
        )
    return SafetensorsFile(path)


class FolderSource(ModelSource):
    """A folder in the layout of transformers' save_pretrained. See `open_model` for the errors."""

    def __init__(self, folder: Path, origin: str | None = None) -> None:
        self.folder = folder
        self.origin = origin or folder.resolve().name
        self.config = _load_config(folder)
        check_causal_lm(self.config, str(folder))
        card = front_matter(folder)
        self.base_model = origin or card.get("base_model")
        self.licence = find_licence(folder, card.get("license"))
        self._files = open_shards(folder)
        check_depth(self.config, len(self._files), str(folder))
        model = self.empty_model()
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self._shapes = expected_tensors(model)
        self._slices: dict[str, StackedSlice] = {}
        self._stored = self._match(self._shapes, prefix, stacked_slices(model))

    def _match(
        self, expected: dict[str, tuple[int, ...]], prefix: str, slices: dict[str, StackedSlice]
    ) -> dict[str, str]:
        """State-dict name -> name in the files, which may lack the base model's `prefix` (`transformer.`, `model.`).

        slices: where layers of experts lie in stacked tensors, for files that have those.
        """
        stored, missing = {}, []
        for name, shape in expected.items():
            found = next((n for n in names_in_files(name, prefix) if n in self._files), None)
            if found is None and name in slices:
                found = next((n for n in names_in_files(slices[name].stack, prefix) if n in self._files), None)
                self._slices |= {name: slices[name]} if found else {}
            if found is None:
                missing.append(name)
                continue
            actual = self._files[found].header.tensors[found].shape
            if not (fits(slices[name], actual, shape) if name in self._slices else actual == shape):
                raise self._misfit(f"tensor {name} is {list(actual)}, the config asks for {list(shape)}")
            stored[name] = found
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise self._misfit(f"no tensor for {', '.join(missing[:3])}{more}")
        ignored = sorted(set(self._files) - set(stored.values()) - set(expected))
        if ignored:
            self.notes = (f"{len(ignored)} tensors are not part of the model and are left out, such as {ignored[0]}",)
        return stored

    def _misfit(self, why: str) -> CheckpointError:
        hint = "check that config.json belongs to these weights"
        if ".experts." in why:
            hint += "; if transformers renames them while it loads, load the model there and call lowbit.quantize"
        return CheckpointError("LB0112", f"{why} ({type(self.config).__name__})", where=str(self.folder), hint=hint)

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        self._stored[name]  # KeyError for what is not there
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._file(name).header.tensors[self._stored[name]].dtype

    def tensor(self, name: str) -> torch.Tensor:
        if (part := self._slices.get(name)) is not None:
            return part.of(self._file(name).tensor(self._stored[name], part.expert))
        return self._file(name).tensor(self._stored[name])

    def _file(self, name: str) -> SafetensorsFile:
        return self._files[self._stored[name]]

    def extras(self) -> list[Path]:
        return carried_files(self.folder)

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False, local_files_only=True)
        except Exception as e:
            raise CheckpointError("LB0117", f"no usable tokenizer: {str(e)[:200]}", where=str(self.folder)) from e

    def digest(self) -> str:
        return folder_digest(self.folder, self._files)


def carried_files(folder: Path) -> list[Path]:
    """Files that go with a model wherever it goes: tokenizer, generation config, chat templates, licence.

    Raises CheckpointError (LB0103) for a link that leaves the folder.
    """
    found = {p for pattern in _EXTRAS for p in folder.glob(pattern) if p.is_file()}
    for path in found:
        contained(folder, path.relative_to(folder).as_posix())
    return sorted(found)


def folder_digest(folder: Path, files: Mapping[str, SafetensorsFile]) -> str:
    """Cheap identity of the model in `folder` (see `ModelSource.digest`); files: by tensor name."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(set(files.values()), key=lambda f: f.header.path):
        digest.update(file.header.digest.encode())
        digest.update(file_digest(file.header.path).encode())
    return digest.hexdigest()


def _load_config(folder: Path) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").exists():
        raise CheckpointError(
            "LB0108", "has no config.json", where=str(folder), hint="give the folder that transformers loads"
        )
    values = load_json(contained(folder, "config.json"), "LB0108")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as e:  # config classes validate themselves with errors of many kinds
        why = (
            f"transformers cannot read config.json (model_type {str(values.get('model_type'))[:60]!r}): {str(e)[:200]}"
        )
        raise CheckpointError("LB0108", why, where=str(folder)) from e


def find_licence(folder: Path, name: str | None) -> Licence:
    """The licence of a model folder: `name` from its card, else guessed from its LICENSE file."""
    files = sorted(p for pattern in ("LICENSE*", "LICENCE*") for p in folder.glob(pattern) if p.is_file())
    text = files[0].read_text(errors="replace")[:100_000] if files else None
    if name is None and text is not None:
        head = text[:600]
        known = {"Apache License": "apache-2.0", "MIT License": "mit", "BSD 3-Clause": "bsd-3-clause"}
        name = next((spdx for phrase, spdx in known.items() if phrase in head), "other")
    return Licence(name, text)


def front_matter(folder: Path) -> dict[str, str]:
    """`license` and `base_model` of the folder's model card, where they are plain words."""
    path = folder / "README.md"
    if not path.is_file():
        return {}
    head = re.match(r"---\n(.*?)\n---", path.read_text(errors="replace")[:20_000], re.DOTALL)
    fields = re.findall(
        r"^(license|base_model):[ \t]*[\"']?([\w./-]{1,120})[\"']?[ \t]*$", head[1] if head else "", re.M
    )
    return dict(fields)
