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
from typing import Any

from lowbit.compiler.errors import CheckpointError, FormatError
from lowbit.quantizers.formats import WeightFormat, parse_format

__all__ = ["CONFIG_FILE", "CONFIG_SOURCE", "SCHEMA", "formats_from_config", "guard", "quantization_config", "unguard"]

SCHEMA = 1
"""Version of the native layout. Readers take every version up to their own."""

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


def quantization_config(formats: Mapping[str, WeightFormat]) -> dict[str, Any]:
    """The `quantization_config` of a native checkpoint: the format of every quantized module, as text."""
    return {"quant_method": "lowbit", "schema": SCHEMA, "modules": {path: str(fmt) for path, fmt in formats.items()}}


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
