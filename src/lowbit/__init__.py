"""lowbit: a quantization compiler and kernel generator.

    import lowbit

    model = lowbit.quantize(model, "w4a16", calibration="text.txt", tokenizer=tokenizer)
    lowbit.save(model, "out")
    model = lowbit.compile(lowbit.load("out"), max_tokens=512)

Importing this package is cheap: torch and transformers are imported when a function is first used. It also makes
transformers know checkpoints whose `quant_method` is `lowbit`, without importing transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lowbit import _hook

if TYPE_CHECKING:
    from lowbit.api import (
        bisect,
        compare,
        compile,
        convert,
        explain,
        export,
        load,
        locate,
        perplexity,
        quantize,
        save,
        tune,
    )
    from lowbit.compiler.errors import LowbitError
    from lowbit.compiler.runtime.embedding import quantize_embedding, quantize_head
    from lowbit.compiler.runtime.kvcache import QuantizedCache
    from lowbit.compiler.runtime.package import load_exported

__version__ = "0.1.0"

__all__ = [
    "LowbitError",
    "QuantizedCache",
    "__version__",
    "bisect",
    "compare",
    "compile",
    "convert",
    "explain",
    "export",
    "load",
    "load_exported",
    "locate",
    "perplexity",
    "quantize",
    "quantize_embedding",
    "quantize_head",
    "save",
    "tune",
]

_VERBS = (
    "bisect",
    "compare",
    "compile",
    "convert",
    "explain",
    "export",
    "load",
    "locate",
    "perplexity",
    "quantize",
    "save",
    "tune",
)
_HOMES = {name: "lowbit.api" for name in _VERBS}
_HOMES["LowbitError"] = "lowbit.compiler.errors"
_HOMES["QuantizedCache"] = "lowbit.compiler.runtime.kvcache"
_HOMES |= dict.fromkeys(("quantize_embedding", "quantize_head"), "lowbit.compiler.runtime.embedding")
_HOMES["load_exported"] = "lowbit.compiler.runtime.package"  # needs nothing else of the package

_hook.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lowbit' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
