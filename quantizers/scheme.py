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
    [tune]
    epochs = 2
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.formats import WeightFormat, parse_format

__all__ = ["PRESETS", "Scheme", "Tuning", "load_scheme"]

_KEYS = {"name", "weight", "method", "ignore", "options", "overrides", "tune", "finetune"}
_TUNE = ("tune", "finetune")


@dataclass(frozen=True)
class Tuning:
    """Training of side values (scales, offsets, codebooks) and norm weights with frozen codes.

    epochs: passes over the calibration samples. rate: first step size, as a share of a tensor's root mean square.
    batch: samples per step. norms: train norm weights and biases too.
    """

    epochs: int = 2
    rate: float = 4e-3
    batch: int = 4
    norms: bool = True

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch < 1 or not 0 < self.rate < 1:
            raise FormatError("LB0232", "tuning needs epochs and batch of at least 1 and a rate between 0 and 1")

    @staticmethod
    def from_dict(values: Any, where: str) -> Tuning:
        """From a table of a scheme file; raises FormatError (LB0232) for unknown keys or values of the wrong kind."""
        known = {f.name: type(f.default) for f in fields(Tuning)}
        if not isinstance(values, Mapping) or set(values) - set(known):
            raise FormatError("LB0232", f"tuning takes a table of {', '.join(known)}", where=where)
        for name, value in values.items():
            fits = isinstance(value, known[name]) and isinstance(value, bool) == (known[name] is bool)
            if not fits and not (known[name] is float and type(value) is int):
                raise FormatError("LB0232", f"{name} must be {known[name].__name__}, not {value!r}", where=where)
        return Tuning(**values)


@dataclass(frozen=True)
class Scheme:
    """A weight format and method for a whole model; see the module's docstring.

    overrides: (glob over module paths, format or None to keep the layer as it is), first match wins.
    ignore: globs of layers that stay as they are; a glob matches the whole path or its last part. tune: train side
    values block by block against the float model's hidden states. finetune: then train them all together against its
    predictions.
    """

    name: str
    weight: WeightFormat
    method: str = "gptq"
    options: Mapping[str, Any] = field(default_factory=dict)
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: tuple[tuple[str, WeightFormat | None], ...] = ()
    tune: Tuning | None = None
    finetune: Tuning | None = None

    def format_for(self, path: str) -> WeightFormat | None:
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
            **{name: asdict(value) for name in ("tune", "finetune") if (value := getattr(self, name)) is not None},
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
            *(Tuning.from_dict(values[key], f"{where}: {key}") if key in values else None for key in _TUNE),
        )


def _matches(path: str, glob: str) -> bool:
    return fnmatchcase(path, glob) or fnmatchcase(path.rsplit(".", 1)[-1], glob)


def _preset(name: str, fmt: str, method: str = "gptq", tune: Tuning | None = None) -> Scheme:
    return Scheme(name, parse_format(fmt), method, tune=tune)


PRESETS: dict[str, Scheme] = {
    s.name: s
    for s in (
        _preset("w8a16", "int8.ch.sym", "rtn"),
        _preset("w6a16", "int6.g128.sym"),
        _preset("w6a16-fp6", "e2m3.ch"),
        _preset("w6-zeroquant", "e3m2.ch", "rtn"),
        _preset("w5a16", "int5.g64.sym"),
        _preset("w4a16", "int4.g64.sym"),
        _preset("w3a16", "int3.g64.asym"),
        _preset("w2a16", "int2.g64.asym"),
        _preset("w3-vptq", "vq.d4.k256.r16", "vptq", Tuning()),
        _preset("w3-decoupleq", "int3.g64.fz", "decoupleq", Tuning()),
        _preset("w2-vptq", "vq.d4.k256", "vptq", Tuning()),
        _preset("w2-decoupleq", "int2.g64.fz", "decoupleq", Tuning()),
    )
}
"""Named schemes, sizes from large to small. int4.g64.sym is the default: exact in every consumer, 4.25 bits.

w6-zeroquant is the FP6 of "ZeroQuant(4+2): Redefining LLMs Quantization with a New FP6-Centric Strategy for Diverse
Generative Tasks" (Wu et al.): e3m2, one scale per row, rounded to nearest. w6a16-fp6 gives the mantissa a bit more.
"""


def load_scheme(
    text: str,
    *,
    format: str | None = None,
    method: str | None = None,
    tune: int | None = None,
    finetune: int | None = None,
) -> Scheme:
    """A preset or TOML file, with format, method and the passes of tuning and fine-tuning (0: none) replaced where
    given.

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
    for name, passes in (("tune", tune), ("finetune", finetune)):
        if passes is not None:
            settings = replace(getattr(scheme, name) or Tuning(), epochs=passes) if passes else None
            scheme = replace(scheme, **{name: settings})  # type: ignore[arg-type]
    return scheme if method is None else replace(scheme, method=method)
