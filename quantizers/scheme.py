"""Schemes: what a model gets. A weight format, a method with its options, and exceptions by module path.

A scheme is a preset name (`w4a16`), a TOML file, or either with `format` and `method` replaced:

    weight = "int4.g64.sym"
    method = "gptq"
    ignore = ["lm_head"]
    [options]
    damping = 0.01
    [overrides]
    "*.down_proj" = "int8.ch.sym"
    "model.layers.0.*" = "keep"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.formats import Format, parse_format

__all__ = ["PRESETS", "Scheme", "load_scheme"]

_KEYS = {"name", "weight", "method", "ignore", "options", "overrides"}


@dataclass(frozen=True)
class Scheme:
    """A weight format and method for a whole model; see the module's docstring.

    overrides: (glob over module paths, format or None to keep the layer as it is), first match wins.
    ignore: globs of layers that stay as they are; a glob matches the whole path or its last part.
    """

    name: str
    weight: Format
    method: str = "gptq"
    options: Mapping[str, Any] = field(default_factory=dict)
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: tuple[tuple[str, Format | None], ...] = ()

    def format_for(self, path: str) -> Format | None:
        """The format of the linear layer at `path`, or None when it is kept as it is."""
        for glob, fmt in self.overrides:
            if _matches(path, glob):
                return fmt
        if any(_matches(path, glob) for glob in self.ignore):
            return None
        return self.weight

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for TOML, JSON and file metadata."""
        return {
            "name": self.name,
            "weight": str(self.weight),
            "method": self.method,
            "options": dict(self.options),
            "ignore": list(self.ignore),
            "overrides": {glob: str(fmt) if fmt else "keep" for glob, fmt in self.overrides},
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any], where: str = "scheme") -> Scheme:
        """Inverse of `to_dict`; raises FormatError (LB0231) for keys that do not exist or values of the wrong kind."""
        unknown = sorted(set(values) - _KEYS)
        if unknown:
            raise FormatError("LB0231", f"unknown keys {unknown}", where=where, hint=f"use {', '.join(sorted(_KEYS))}")
        if not isinstance(values.get("weight"), str):
            raise FormatError("LB0231", "`weight` must be a format, such as 'int4.g64.sym'", where=where)
        overrides = values.get("overrides", {})
        return Scheme(
            str(values.get("name", "custom")),
            parse_format(values["weight"]),
            str(values.get("method", "gptq")),
            dict(values.get("options", {})),
            tuple(values.get("ignore", ("lm_head",))),
            tuple((glob, None if text == "keep" else parse_format(text)) for glob, text in overrides.items()),
        )


def _matches(path: str, glob: str) -> bool:
    return fnmatchcase(path, glob) or fnmatchcase(path.rsplit(".", 1)[-1], glob)


def _preset(name: str, fmt: str, method: str = "gptq") -> Scheme:
    return Scheme(name, parse_format(fmt), method)


PRESETS: dict[str, Scheme] = {
    s.name: s
    for s in (
        _preset("w8a16", "int8.ch.sym", "rtn"),
        _preset("w6a16", "int6.g128.sym"),
        _preset("w5a16", "int5.g64.sym"),
        _preset("w4a16", "int4.g64.sym"),
        _preset("w3a16", "int3.g64.asym"),
        _preset("w2a16", "int2.g64.asym"),
    )
}
"""Named schemes, sizes from large to small. int4.g64.sym is the default: exact in every consumer, 4.25 bits."""


def load_scheme(text: str, *, format: str | None = None, method: str | None = None) -> Scheme:
    """A preset or TOML file, with format and method replaced where given.

    Raises FormatError LB0230 for a name that is neither, LB0231 for a bad file, LB0210 for a bad format.
    """
    path = Path(text)
    if text in PRESETS:
        scheme = PRESETS[text]
    elif path.suffix == ".toml" and path.is_file():
        try:
            values = tomllib.loads(path.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
            raise FormatError("LB0231", f"not valid TOML: {e}", where=text) from e
        scheme = Scheme.from_dict({"name": path.stem, **values}, where=text)
    else:
        raise FormatError(
            "LB0230",
            f"no scheme is called {text!r}",
            hint="use " + ", ".join(PRESETS) + ", or the path of a .toml file",
        )
    if format is not None:
        scheme = replace(scheme, weight=parse_format(format), name=f"{scheme.name}+{format}")
    return scheme if method is None else replace(scheme, method=method)
