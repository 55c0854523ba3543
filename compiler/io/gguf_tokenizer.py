"""The tokenizer of a model folder as llama.cpp has it: byte-level BPE (`gpt2`) and SentencePiece's BPE (`llama`).

transformers' tokenizer is read, not files: whatever it made of them is what a model was trained with or calibrated on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.gguf_splits import pre_tokenizer_name, steps

__all__ = ["Vocabulary", "read_vocabulary"]

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = range(1, 7)  # llama.cpp's token types
_GPT2, _LLAMA = "gpt2", "llama"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in GGUF's terms. tokens, types: by id. merges: of `gpt2`; scores: of `llama`, the highest is merged
    first. ids: of special tokens (bos, eos, unk, pad) by that name."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]
    ids: dict[str, int]
    add_bos: bool
    add_eos: bool
    space_prefix: bool
    template: str | dict[str, str] | None

    def write(self, writer: Any) -> None:
        """Write it to a gguf.GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for name, token in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        writer.add_add_space_prefix(self.space_prefix)
        if isinstance(self.template, str):
            writer.add_chat_template(self.template)
        elif self.template:
            writer.add_chat_template([{"name": k, "template": v} for k, v in self.template.items()])


def read_vocabulary(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer of a model folder, with unused tokens up to the `rows` of its embedding.

    Raises CheckpointError: LB0117 no tokenizer that transformers can read, LB0123 one that GGUF has no form for, or
    with more tokens than rows.
    """
    tokenizer = _load(folder)
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    model = values["model"]
    kind = _kind(values, str(folder))
    tokens, types = _tokens(values, tokenizer, kind, rows, str(folder))
    first, last = _frame(tokenizer)
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    return Vocabulary(
        model=kind,
        pre=pre_tokenizer_name(values) if kind == _GPT2 else "default",
        tokens=tokens,
        types=types,
        merges=[_merge_text(merge) for merge in model["merges"]] if kind == _GPT2 else [],
        scores=_scores(model, tokens) if kind == _LLAMA else [],
        ids={name: token for name, token in ids.items() if token is not None},
        add_bos=first is not None and first == ids["bos"],
        add_eos=last is not None and last == ids["eos"],
        space_prefix=kind == _LLAMA and _space_prefix(values),
        template=getattr(tokenizer, "chat_template", None),
    )


def _load(folder: Path) -> Any:
    """A transformers tokenizer with a backend of the package tokenizers."""
    from transformers import AutoTokenizer

    from lowbit.compiler.io.hf_config import register

    register()  # transformers may look at config.json, which says `lowbit` in native checkpoints
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as e:
        raise CheckpointError("LB0117", f"no usable tokenizer: {str(e)[:200]}", where=str(folder)) from e
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise CheckpointError("LB0117", "has no tokenizer.json, which GGUF's tokenizer is made of", where=str(folder))
    return tokenizer


def _kind(values: Mapping[str, Any], where: str) -> str:
    model = values["model"]
    if model["type"] == "BPE" and any(step["type"] == "ByteLevel" for step in steps(values["pre_tokenizer"])):
        return _GPT2
    spaces = all(step["type"] in ("Prepend", "Replace", "Metaspace") for step in _text_steps(values))
    if model["type"] == "BPE" and model.get("byte_fallback") and "<0x00>" in model["vocab"] and spaces:
        return _LLAMA
    why = f"its tokenizer ({str(model['type'])[:40]}) is neither byte-level BPE nor SentencePiece's BPE"
    raise CheckpointError("LB0123", why, where=where)


def _tokens(values: Mapping[str, Any], tokenizer: Any, kind: str, rows: int, where: str) -> tuple[list[str], list[int]]:
    """Texts and types of the tokens 0 to `rows` - 1."""
    by_id = {token: text for text, token in tokenizer.get_vocab().items()}
    if by_id and max(by_id) >= rows:
        raise CheckpointError("LB0123", f"its tokenizer has token {max(by_id)}, its embedding {rows} rows", where=where)
    added = {entry["id"]: bool(entry["special"]) for entry in values["added_tokens"]}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(rows)]
    types = [_NORMAL if i in by_id else _UNUSED for i in range(rows)]
    for i, special in added.items():
        types[i] = _CONTROL if special else _USER
    if kind == _LLAMA:
        for i, text in enumerate(tokens):
            types[i] = _BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", text) else types[i]
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = _UNKNOWN
    return tokens, types


def _merge_text(merge: str | list[str]) -> str:
    """`left right`; spaces inside, which are no byte-level characters, as their byte-level one."""
    return merge if isinstance(merge, str) else " ".join(part.replace(" ", "Ġ") for part in merge)


def _scores(model: Mapping[str, Any], tokens: list[str]) -> list[float]:
    """By id: tokens that are merged earlier have higher scores, as in the SentencePiece model."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    return [-float(ranks.get(token, len(model["merges"]))) for token in tokens]


def _space_prefix(values: Mapping[str, Any]) -> bool:
    """Whether text begins with a space that nobody wrote."""
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in _text_steps(values)
    )


def _text_steps(values: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*steps(values["normalizer"]), *steps(values["pre_tokenizer"])]


def _frame(tokenizer: Any) -> tuple[int | None, int | None]:
    """The tokens that are put before and after a text, where there are such."""
    plain, framed = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    if len(framed) == len(plain):
        return None, None
    return (framed[0] if framed[0] not in plain else None, framed[-1] if framed[-1] not in plain else None)
