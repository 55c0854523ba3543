"""What makes transformers' config classes understand native checkpoints. Imports no modelling code.

`LowbitConfig` is registered for `model_type: lowbit`. It never exists as an object: reading it gives the config of the
base model, of a class that puts the guard of `native` back when it is saved, so that a checkpoint written by
`save_pretrained` is guarded like the one it came from.
"""

from __future__ import annotations

import functools
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from lowbit.compiler.io import native

__all__ = ["LowbitConfig", "guarded", "register"]


class LowbitConfig(PreTrainedConfig):  # type: ignore[misc]
    """config.json of a native checkpoint."""

    model_type = "lowbit"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The base model's config. Raises CheckpointError (LB0114) when the values are not a guarded config."""
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        import lowbit.compiler.io.hf as hf

        hf.register()  # whoever reads such a config is about to need the quantizer
        values = native.unguard(config_dict)
        return guarded(CONFIG_MAPPING[values["model_type"]]).from_dict(values, **kwargs)


@functools.cache
def guarded(base: Any) -> Any:
    """A subclass of a config class, under the same name, whose saved form is guarded while the model is native.

    The name matters: transformers finds the model class of a config by the name of its class.
    """
    if hasattr(base, "_lowbit_base"):
        return base

    def to_diff_dict(self: Any) -> dict[str, Any]:
        values: dict[str, Any] = base.to_diff_dict(self)
        quantization = values.get("quantization_config")
        is_native = isinstance(quantization, dict) and quantization.get("quant_method") == "lowbit"
        return native.guard(values, auto_map=False) if is_native else values

    def reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
        return (_restore, (base, self.__dict__.copy()))

    members = {
        "to_diff_dict": to_diff_dict,
        "__reduce_ex__": reduce,
        "_lowbit_base": base,
        "__module__": base.__module__,
        "__doc__": base.__doc__,
    }
    return type(base)(base.__name__, (base,), members)


def _restore(base: type, state: dict[str, Any]) -> Any:
    """Copying and pickling: the subclass has no importable name of its own."""
    cls = guarded(base)
    config = cls.__new__(cls)
    config.__dict__.update(state)
    return config


def register() -> None:
    """Make `model_type: lowbit` known to AutoConfig; does nothing the second time."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register("lowbit", LowbitConfig, exist_ok=True)
