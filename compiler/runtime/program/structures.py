"""The C structures of `codegen/cpp/decoder/text/model.h`, as ctypes."""

from __future__ import annotations

import ctypes
from typing import Any

__all__ = ["CGated", "CKernel", "CLayer", "CLinear", "CMixture", "CModel", "CState"]

_P, _I = ctypes.c_void_p, ctypes.c_int64


def _structure(name: str, *fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields)})


CKernel: Any = _structure("CKernel", ("classes", _I), ("tokens", _I * 16), ("run", _P * 16))
CLinear: Any = _structure(
    "CLinear", ("kernel", _P), ("weight", _P), ("bias", _P), ("dense", _P), ("n", _I), ("k", _I), ("type", _I)
)
CGated: Any = _structure("CGated", *((name, CLinear) for name in ("gate", "up", "down")))
CMixture: Any = _structure(
    "CMixture",
    ("experts", _P),
    *((count, _I) for count in ("count", "active", "normalised")),
    *((name, CLinear) for name in ("router", "shared_gate")),
    ("shared", CGated),
)
CLayer: Any = _structure(
    "CLayer",
    *((norm, _P) for norm in ("input_norm", "inner_norm", "query_norm", "key_norm")),
    *((name, CLinear) for name in ("q", "k", "v", "o")),
    ("mlp", CGated),
    ("window", _I),
    ("rope", _I),
    ("mixture", _P),
)
CModel: Any = _structure("CModel", ("layers", _P), ("embedding", _P), ("norm", _P), ("rope", _P * 2), ("head", CLinear))
CState: Any = _structure(
    "CState",
    ("keys", _P),
    ("values", _P),
    *((count, _I) for count in ("context", "tokens", "threads")),
    *((buffer, _P) for buffer in ("hidden", "normed", "qkv", "mixed", "inner", "scores")),
    ("scratch", _P),
    ("scratch_bytes", _I),
    ("packed", _P * 8),
    ("k_rows", _I),
    ("v_rows", _I),
    ("partial", _P),
    ("few", _P),
    *((buffer, _P) for buffer in ("rows", "given", "odds", "shares", "chosen", "places", "ends")),
)
