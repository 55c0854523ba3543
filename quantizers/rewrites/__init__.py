"""Rewrites: function-preserving changes of a model before it is quantized. A new one is one file and one entry here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.rewrites.awq import Awq
from lowbit.quantizers.rewrites.base import Decisions, Outcome, Rewrite, Scene
from lowbit.quantizers.rewrites.edits import Edits, TensorEdit
from lowbit.quantizers.rewrites.permute import Permute
from lowbit.quantizers.rewrites.rotate import Rotate
from lowbit.quantizers.rewrites.smooth import Smooth

__all__ = [
    "REWRITES",
    "Awq",
    "Decisions",
    "Edits",
    "Outcome",
    "Permute",
    "Rewrite",
    "Rotate",
    "Scene",
    "Smooth",
    "TensorEdit",
    "parse_rewrite",
    "parse_rewrites",
    "rewrite_text",
]

REWRITES: dict[str, type[Rewrite]] = {"smooth": Smooth, "rotate": Rotate, "awq": Awq, "permute": Permute}
"""Name -> rewrite, in the order in which they make sense. Options are the fields of the dataclass."""


def parse_rewrite(text: str) -> Rewrite:
    """The rewrite written as `text`; raises FormatError (LB0245) saying what one looks like.

    >>> parse_rewrite("smooth{alpha=0.8}")
    Smooth(alpha=0.8, search=False, outputs=0.0, inputs=True)
    """
    m = re.fullmatch(r"(\w+)(?:\{(.*)\})?", text.strip())
    kind = REWRITES.get(m[1]) if m else None
    if m is None or kind is None:
        raise _unknown(text, "no rewrite has that name")
    known = {f.name: type(f.default) for f in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, object] = {}
    for part in filter(None, (p.strip() for p in (m[2] or "").split(","))):
        name, _, value = (p.strip() for p in part.partition("="))
        if name not in known or name in values:
            raise _unknown(text, f"{name!r} is not one of {', '.join(known)}")
        values[name] = _value(text, value, known[name])
    return kind(**values)


def _value(text: str, value: str, kind: type) -> object:
    if kind is bool and value in ("true", "false"):
        return value == "true"
    try:
        return value if kind is str else kind(value) if kind is not bool else _fail()
    except ValueError:
        raise _unknown(text, f"{value!r} is not a {kind.__name__}") from None


def _fail() -> object:
    raise ValueError


def parse_rewrites(texts: Sequence[str]) -> tuple[Rewrite, ...]:
    """Several rewrites in order; raises FormatError (LB0245) when one comes twice or after one it would undo."""
    found = tuple(parse_rewrite(t) for t in texts)
    order = [list(REWRITES).index(r.name) for r in found]
    if order != sorted(set(order)):
        raise FormatError(
            "LB0245",
            f"rewrites {', '.join(r.name for r in found)} do not go together in that order",
            hint="give each once, in the order " + ", ".join(REWRITES),
        )
    return found


def rewrite_text(rewrite: Rewrite) -> str:
    """The text `parse_rewrite` reads; options at their defaults are left out."""
    options = [(f.name, getattr(rewrite, f.name), f.default) for f in fields(rewrite)]  # type: ignore[arg-type]
    said = [f"{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v, default in options if v != default]
    return rewrite.name + ("{" + ",".join(said) + "}" if said else "")


def _unknown(text: str, why: str) -> FormatError:
    return FormatError(
        "LB0245", f"cannot read rewrite {text!r}: {why}", hint="write smooth{alpha=0.5}, rotate{seed=0}, awq or permute"
    )
