"""How a byte-level BPE tokenizer splits text into words, under the name llama.cpp has for it.

llama.cpp has code for each name (`tokenizer.ggml.pre`), and no expressions in the file. What transformers splits by is
compared with the few written down here (from llama.cpp's `llama-vocab.cpp`); another becomes `default`, with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

__all__ = ["LLAMA3", "QWEN2", "TEKKEN", "pre_tokenizer_name", "steps"]

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PATTERNS = {
    (LLAMA3, True): "llama-bpe",
    (LLAMA3, False): "smaug-bpe",
    (QWEN2, False): "qwen2",
    (TEKKEN, True): "tekken",
}
"""(regular expression, whether words that are tokens skip the merges) -> llama.cpp's name."""

_log = logging.getLogger("lowbit")


def steps(section: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """The parts of a normalizer or pre-tokenizer, one after the other."""
    if section is None:
        return []
    nested = section.get("pretokenizers") or section.get("normalizers")
    return [section] if nested is None else [step for part in nested for step in steps(part)]


def pre_tokenizer_name(values: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a byte-level BPE tokenizer splits text; `default`, with a warning, where it is none of
    those known here. values: of tokenizer.json."""
    name = _known_name(values)
    if name is None:
        _log.warning(
            "lowbit does not know llama.cpp's name of this tokenizer's pre-tokenizer and writes `default`: llama.cpp "
            "may split text in other tokens than transformers; set tokenizer.ggml.pre with gguf's gguf_new_metadata"
        )
    return name or "default"


def _known_name(values: Mapping[str, Any]) -> str | None:
    parts, skips = steps(values["pre_tokenizer"]), bool(values["model"].get("ignore_merges"))
    # Text is almost always in the form that NFC makes; llama.cpp takes it to be.
    if any(step["type"] != "NFC" for step in steps(values["normalizer"])) or parts[-1].get("add_prefix_space"):
        return None
    kinds, by_regex = [step["type"] for step in parts], parts[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and by_regex and not skips:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0]["individual_digits"] and by_regex and not skips:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not by_regex:
        isolated = parts[0]["behavior"] == "Isolated" and not parts[0].get("invert")
        return _PATTERNS.get((parts[0]["pattern"].get("Regex", ""), skips)) if isolated else None
    return None
