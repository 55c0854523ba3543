"""Methods: how the codes and scales of a format are chosen. A new method is one file and one entry here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lowbit.compiler.errors import RunError
from lowbit.quantizers.methods.base import Method, Quantized, check_finite, proxy_error
from lowbit.quantizers.methods.choose import quantize_weight
from lowbit.quantizers.methods.decoupleq import DecoupleQ
from lowbit.quantizers.methods.fmpq import Fmpq
from lowbit.quantizers.methods.gptq import Gptq
from lowbit.quantizers.methods.rtn import Rtn
from lowbit.quantizers.methods.target import asymmetric, in_mode
from lowbit.quantizers.methods.vptq import Vptq

__all__ = [
    "METHODS",
    "DecoupleQ",
    "Fmpq",
    "Gptq",
    "Method",
    "Quantized",
    "Rtn",
    "Vptq",
    "asymmetric",
    "check_finite",
    "in_mode",
    "make_method",
    "proxy_error",
    "quantize_weight",
]

METHODS: dict[str, type[Method]] = {"rtn": Rtn, "gptq": Gptq, "fmpq": Fmpq, "decoupleq": DecoupleQ, "vptq": Vptq}
"""Name -> method. Options are the fields of the dataclass."""


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method called `name` with these options.

    Raises RunError: LB0501 for a method that does not exist, LB0502 for an option it does not have, LB0503 for a value
    it cannot take.
    """
    kind = METHODS.get(name)
    if kind is None:
        raise RunError("LB0501", f"no method is called {name!r}", hint="use " + " or ".join(METHODS))
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(options) - set(fields))
    if unknown:
        raise RunError("LB0502", f"{name} has no option {unknown[0]!r}", hint="use " + ", ".join(fields))
    for key, value in options.items():
        default = fields[key].default
        wanted = float if default is None else type(default)  # what a run may choose is a number
        fits = isinstance(value, wanted) and not (wanted is int and isinstance(value, bool))
        if not fits and not (wanted is float and isinstance(value, int) and not isinstance(value, bool)):
            raise RunError("LB0503", f"option {key!r} must be {wanted.__name__}, not {value!r}", where=name)
    return kind(**options)
