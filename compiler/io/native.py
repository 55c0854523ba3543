"""The native layout: any format, for readers that have lowbit, and a refusal for those that do not.

transformers skips a quantization method that it does not know: it logs a line and loads random weights. So a native
checkpoint must not be loadable without lowbit by any route. Its config.json says `model_type: lowbit`, which no
transformers knows unless lowbit has registered it (`AutoModel...` raises); and `transformers_weights`, the name of the
file to load, is a text that says what is needed (`LlamaForCausalLM.from_pretrained` and the like do not look at the
model type, but refuse that name and show it). With `import lowbit`, the registered config class takes both out again.
`auto_map` points to a file that imports lowbit, so that `trust_remote_code=True` works or says which package is
missing; alone it would guard nothing, because transformers prefers its own class for a model type that it knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.compiler.errors import CheckpointError, FormatError
from lowbit.quantizers.formats import WeightFormat, parse_activation, parse_format
from lowbit.quantizers.formats.kv import parse_kv_format
from lowbit.quantizers.hadamard import split_order

__all__ = [
    "CONFIG_FILE",
    "CONFIG_SOURCE",
    "SCHEMA",
    "StoredInput",
    "formats_from_config",
    "guard",
    "inputs_from_config",
    "kv_from_config",
    "quantization_config",
    "unguard",
]

SCHEMA = 2
"""Version of the native layout; 2 where layers do something to their inputs, else 1. Readers take every version up to
their own."""


@dataclass(frozen=True)
class StoredInput:
    """What a layer does to its input: blocks of `rotate` columns are rotated, then rounded to `activation` (the text of
    an ActivationFormat), with the static scales `scale` float32 [groups] where the format has such; they are stored
    as the layer's tensor `input_scale`."""

    activation: str = ""
    rotate: int = 0
    scale: torch.Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """The values of config.json."""
        values = {"activation": self.activation, "rotate": self.rotate}
        return {name: value for name, value in values.items() if value}

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the layer's tensors that belong to its input."""
        return ("input_scale",) if self.activation and parse_activation(self.activation).static else ()


_MESSAGE = "none without lowbit: `import lowbit`, then AutoModelForCausalLM.from_pretrained or lowbit.load"

CONFIG_FILE = "configuration_lowbit.py"
CONFIG_SOURCE = '''"""Loads this checkpoint's config through the lowbit package (pip install lowbit)."""

import lowbit  # noqa: F401
from lowbit.compiler.io.hf import LowbitConfig  # noqa: F401
'''


def guard(config: Mapping[str, Any], *, auto_map: bool) -> dict[str, Any]:
    """`config` (the values of config.json) in the form that nothing loads without lowbit."""
    guarded = dict(config)
    guarded["base_model_type"] = config["model_type"]
    guarded["model_type"] = "lowbit"
    guarded["transformers_weights"] = _MESSAGE
    if auto_map:
        guarded["auto_map"] = {"AutoConfig": f"{CONFIG_FILE.removesuffix('.py')}.LowbitConfig"}
    return guarded


def unguard(config: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `guard`; raises CheckpointError (LB0114) when the base model's type is not there."""
    values = dict(config)
    base = values.pop("base_model_type", None)
    if not isinstance(base, str) or base == "lowbit":
        raise CheckpointError("LB0114", "config.json has no base_model_type", where="config.json")
    values["model_type"] = base
    for key in ("transformers_weights", "auto_map"):
        values.pop(key, None)
    return values


def quantization_config(
    formats: Mapping[str, WeightFormat],
    inputs: Mapping[str, StoredInput] | None = None,
    kv: str = "",
    experts: bool = False,
) -> dict[str, Any]:
    """The `quantization_config` of a native checkpoint: the format of every quantized module, as text, what modules do
    to their inputs, the format that the key-value cache is meant to have, and whether tensors of experts are one per
    layer and expert, not stacked."""
    modules = {path: str(fmt) for path, fmt in formats.items()}
    found = {path: values for path, given in (inputs or {}).items() if (values := given.to_dict())}
    more: dict[str, Any] = {**({"inputs": found} if found else {}), **({"kv": kv} if kv else {})}
    more |= {"experts": True} if experts else {}
    return {"quant_method": "lowbit", "schema": SCHEMA if found else 1, "modules": modules, **more}


def inputs_from_config(config: Mapping[str, Any], where: str) -> dict[str, StoredInput]:
    """What modules do to their inputs, by path; raises CheckpointError (LB0114) for an entry that cannot be read."""
    found: dict[str, StoredInput] = {}
    given = config.get("inputs", {})
    try:
        for path, values in given.items():
            found[path] = StoredInput(**{"activation": "", "rotate": 0, **values})
            if found[path].activation:
                parse_activation(found[path].activation)
            if type(found[path].rotate) is not int or found[path].scale is not None:
                raise TypeError("rotate is a number, and there is no scale here")
            if found[path].rotate:
                split_order(found[path].rotate)
    except (AttributeError, TypeError, FormatError) as e:
        raise CheckpointError("LB0114", f"quantization_config has bad `inputs`: {e}", where=where) from e
    return found


def kv_from_config(config: Mapping[str, Any], where: str) -> str:
    """The format of the key-value cache, an empty text where there is none; raises CheckpointError (LB0114) for one
    that cannot be read."""
    try:
        return str(parse_kv_format(config["kv"])) if "kv" in config else ""
    except (AttributeError, TypeError, FormatError) as e:
        raise CheckpointError("LB0114", f"the checkpoint has a bad cache format: {e}", where=where) from e


def formats_from_config(config: Mapping[str, Any], where: str) -> dict[str, WeightFormat]:
    """Formats by module path; raises CheckpointError (LB0114) for a schema from the future or a bad entry."""
    schema, modules = config.get("schema"), config.get("modules")
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        hint = "update lowbit" if type(schema) is int and schema > SCHEMA else None
        raise CheckpointError(
            "LB0114", f"schema {schema!r} is not one this lowbit reads ({SCHEMA})", where=where, hint=hint
        )
    if not isinstance(modules, dict) or not all(isinstance(text, str) for text in modules.values()):
        raise CheckpointError("LB0114", "quantization_config needs `modules`: path to format", where=where)
    try:
        return {path: parse_format(text) for path, text in modules.items()}
    except FormatError as e:
        raise CheckpointError("LB0114", e.message, where=where) from e
