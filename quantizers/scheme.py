"""Schemes: what a model gets. A weight format, a method with its options, and exceptions by module path.

A scheme is a preset name (`w4a16`), a TOML file, or either with `format` and `method` replaced:

    weight = "int4.g64.sym"
    activation = "int8.token"
    kv = "kv4.kc64.vt.w64"
    method = "gptq"
    rewrites = ["smooth{alpha=0.6}", "permute"]
    ignore = ["lm_head"]
    [options]
    damping = 0.01
    [overrides]
    "*.down_proj" = "int8.ch.sym"
    "model.layers.0.*" = "keep"
    [activations]
    "*.o_proj" = "int8.g64"
    [tune]
    epochs = 2
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from lowbit.compiler.errors import FormatError
from lowbit.quantizers.formats import ActivationFormat, WeightFormat, parse_activation, parse_format
from lowbit.quantizers.formats.kv import KVFormat, parse_kv_format
from lowbit.quantizers.rewrites import Rewrite, parse_rewrites, rewrite_text

__all__ = ["PRESETS", "Scheme", "Tuning", "load_scheme"]

_KEYS = {
    "name", "weight", "method", "ignore", "options", "overrides", "tune", "finetune",
    "activation", "activations", "kv", "rewrites",
}  # fmt: skip
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
    predictions. activation: what the inputs of quantized layers are rounded to, with exceptions in `activations` (glob,
    format or None for inputs that stay as they are). kv: the format of the key-value cache. rewrites: function-
    preserving changes of the model before it is quantized, in order.
    """

    name: str
    weight: WeightFormat
    method: str = "gptq"
    options: Mapping[str, Any] = field(default_factory=dict)
    ignore: tuple[str, ...] = ("lm_head",)
    overrides: tuple[tuple[str, WeightFormat | None], ...] = ()
    tune: Tuning | None = None
    finetune: Tuning | None = None
    activation: ActivationFormat | None = None
    activations: tuple[tuple[str, ActivationFormat | None], ...] = ()
    kv: KVFormat | None = None
    rewrites: tuple[Rewrite, ...] = ()

    def format_for(self, path: str) -> WeightFormat | None:
        """The format of the linear layer at `path`, or None when it is kept as it is."""
        for glob, fmt in self.overrides:
            if _matches(path, glob):
                return fmt
        if any(_matches(path, glob) for glob in self.ignore):
            return None
        return self.weight

    def activation_for(self, path: str) -> ActivationFormat | None:
        """What the inputs of the linear layer at `path` are rounded to, or None where they stay as they are."""
        if self.format_for(path) is None:
            return None
        return next((fmt for glob, fmt in self.activations if _matches(path, glob)), self.activation)

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
            **{name: str(value) for name in ("activation", "kv") if (value := getattr(self, name)) is not None},
            **({"rewrites": [rewrite_text(r) for r in self.rewrites]} if self.rewrites else {}),
            **({"activations": {g: str(f) if f else "keep" for g, f in self.activations}} if self.activations else {}),
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
        stages: dict[str, Any] = {k: Tuning.from_dict(values[k], f"{where}: {k}") for k in _TUNE if k in values}
        return Scheme(
            str(values.get("name", "custom")),
            parse_format(values["weight"]),
            str(values.get("method", "gptq")),
            dict(values.get("options", {})),
            tuple(values.get("ignore", ("lm_head",))),
            tuple((glob, None if text == "keep" else parse_format(text)) for glob, text in overrides.items()),
            **stages,
            **_activation_part(values, where),
        )


def _activation_part(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """activation, activations, kv and rewrites of a scheme file."""
    kinds = {"activation": str, "kv": str, "rewrites": list, "activations": Mapping}
    for name, kind in kinds.items():
        given = values.get(name, [] if kind is list else {} if kind is Mapping else "")
        texts = given.values() if isinstance(given, Mapping) else given if isinstance(given, list) else [given]
        if not isinstance(given, kind) or not all(isinstance(text, str) for text in texts):
            example = {str: "a text", list: "a list of texts", Mapping: "a table of globs and formats"}[kind]
            raise FormatError("LB0231", f"`{name}` must be {example}", where=where)
    exceptions = values.get("activations", {}).items()
    return {
        "activation": parse_activation(values["activation"]) if "activation" in values else None,
        "activations": tuple((glob, None if text == "keep" else parse_activation(text)) for glob, text in exceptions),
        "kv": parse_kv_format(values["kv"]) if "kv" in values else None,
        "rewrites": parse_rewrites(values.get("rewrites", ())),
    }


def _matches(path: str, glob: str) -> bool:
    return fnmatchcase(path, glob) or fnmatchcase(path.rsplit(".", 1)[-1], glob)


def _preset(name: str, fmt: str, method: str = "gptq", tune: Tuning | None = None, **more: Any) -> Scheme:
    options = more.pop("options", {})
    return Scheme(name, parse_format(fmt), method, options, tune=tune, **_activation_part(more, name))


_COMET: dict[str, Any] = {"options": {"aware": True}, "activation": "int4.g64.asym", "rewrites": ["permute"]}

PRESETS: dict[str, Scheme] = {
    s.name: s
    for s in (
        _preset("w8a16", "int8.ch.sym", "rtn"),
        _preset("w8a8", "int8.ch.sym", "rtn", activation="int8.token", rewrites=["smooth"]),
        _preset("w8a8-int8", "int8.ch.sym", "rtn", activation="int8.token.w32x16", rewrites=["permute{outliers=6.0}"]),
        _preset("fp8", "e4m3.ch", "rtn", activation="e4m3.token"),
        _preset("w6a16", "int6.g128.sym"),
        _preset("w6a16-fp6", "e2m3.ch"),
        _preset("w6a8", "e2m3.ch", activation="e4m3.token"),
        _preset("w6-zeroquant", "e3m2.ch", "rtn"),
        _preset("w5a16", "int5.g64.sym"),
        _preset("w4a16", "int4.g64.sym"),
        _preset("w4a8", "int4.g64.sym", activation="int8.token"),
        _preset(
            "w4a8-qserve",
            "int4.g64.asym.i8ch",
            activation="int8.token",
            rewrites=["smooth{outputs=0.3,inputs=false}", "rotate{online=false,heads=false}", "permute"],
        ),
        _preset("w4a4", "int4.g64.sym", "fmpq", **_COMET),
        _preset("w4a4kv4", "int4.g64.sym", "fmpq", kv="kv4.kc64.vt.w64", **_COMET),
        _preset("w4a4-quarot", "int4.ch.sym", activation="int4.token.c90", rewrites=["rotate"]),
        _preset("w4a4-atom", "int4.g64.sym", activation="int4.g64.w2.c90", rewrites=["permute{rank=moment}"]),
        _preset("w3a16", "int3.g64.asym"),
        _preset("w2a16", "int2.g64.asym"),
        _preset("w3-vptq", "vq.d4.k256.r16", "vptq", Tuning()),
        _preset("w3-decoupleq", "int3.g64.fz", "decoupleq", Tuning()),
        _preset("w3-tcq", "tcq3.g64"),
        _preset("w2-vptq", "vq.d4.k256", "vptq", Tuning()),
        _preset("w2-decoupleq", "int2.g64.fz", "decoupleq", Tuning()),
        _preset("w2-tcq", "tcq2.g64", "gptq", Tuning()),
    )
}
"""Named schemes, sizes from large to small. int4.g64.sym is the default: exact in every consumer, 4.25 bits.

w6-zeroquant is the FP6 of "ZeroQuant(4+2): Redefining LLMs Quantization with a New FP6-Centric Strategy for Diverse
Generative Tasks" (Wu et al.): e3m2, one scale per row, rounded to nearest. w6a16-fp6 gives the mantissa a bit more.
w8a8 is SmoothQuant's, w8a8-int8 LLM.int8()'s with outliers that calibration finds, w4a4 and w4a4kv4 are COMET's FMPQ
with groups of 64, whose levels here cover the range of each group. w4a4-atom differs from Atom in that the two groups
of kept channels come first and have 4-bit weights; w4a4-quarot has no rotation across heads; w4a8-qserve searches no
ranges.
"""


def load_scheme(
    text: str,
    *,
    format: str | None = None,
    method: str | None = None,
    tune: int | None = None,
    finetune: int | None = None,
    activation: str | None = None,
    kv: str | None = None,
    rewrites: Sequence[str] | None = None,
) -> Scheme:
    """A preset or TOML file, with format, method and the passes of tuning and fine-tuning (0: none) replaced where
    given, and so activation, kv (`none` takes them out) and rewrites.

    Raises FormatError LB0230 for a name that is neither, LB0231 for a bad file, LB0210 for a bad format, LB0240 for a
    bad activation or key-value format, LB0245 for a bad rewrite.
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
    if activation is not None:
        rounding = None if activation == "none" else parse_activation(activation)
        scheme = replace(scheme, activation=rounding, activations=())
    if kv is not None:
        scheme = replace(scheme, kv=None if kv == "none" else parse_kv_format(kv))
    if rewrites is not None:
        scheme = replace(scheme, rewrites=() if list(rewrites) == ["none"] else parse_rewrites(rewrites))
    return scheme if method is None else replace(scheme, method=method)
