"""transformers integration: `import lowbit` is all that loading a native checkpoint needs.

`register` makes the quantization method known; `AutoModelForCausalLM.from_pretrained` then builds the model with
`QuantLinear` modules, and `save_pretrained` writes it back. `load_quantized` and `save_quantized` do the same for every
kind of checkpoint lowbit reads, onto lowbit's kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io import hf_config, native
from lowbit.compiler.io.hf_config import LowbitConfig
from lowbit.compiler.io.load import load_quantized, save_quantized
from lowbit.compiler.runtime.experts import prepare_experts, unstack_experts
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.compiler.runtime.prebuilt import use_kernels
from lowbit.quantizers.formats import WeightFormat

__all__ = [
    "LowbitConfig",
    "LowbitHfQuantizer",
    "LowbitQuantizationConfig",
    "load_quantized",
    "register",
    "save_quantized",
]


class LowbitQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of a native checkpoint: the format of every quantized module."""

    def __init__(
        self,
        modules: Mapping[str, str] | None = None,
        schema: int = native.SCHEMA,
        inputs: Mapping[str, Any] | None = None,
        kv: str | None = None,
        experts: bool = False,
        **unused: Any,
    ) -> None:
        super().__init__(quant_method="lowbit")
        values = {"schema": schema, "modules": dict(modules or {})}
        self.formats: dict[str, WeightFormat] = native.formats_from_config(values, "quantization_config")
        self.inputs = native.inputs_from_config({"inputs": inputs or {}}, "quantization_config")
        self.kv = native.kv_from_config({"kv": kv} if kv else {}, "quantization_config")
        self.experts = bool(experts)

    def to_dict(self) -> dict[str, Any]:
        """The values of config.json."""
        return native.quantization_config(self.formats, self.inputs, self.kv, self.experts)


class LowbitHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps the quantized layers in before transformers loads the weights, which then fit by name."""

    requires_calibration = True
    quantization_config: LowbitQuantizationConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **unused: Any) -> None:
        where = str(getattr(model.config, "_name_or_path", ""))
        if where and Path(where).is_dir():
            use_kernels(Path(where))
        if self.quantization_config.experts:
            unstack_experts(model)
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        names = {name for name, _ in model.named_modules()}
        for path, fmt in self.quantization_config.formats.items():
            # A base model (AutoModel) has the layers without the prefix, and has no head.
            found = next((p for p in (path, path.removeprefix(prefix)) if p in names), None)
            if found is not None:
                _swap(model, found, fmt, self.quantization_config.inputs.get(path, native.StoredInput()))
            elif path.startswith(prefix):
                raise CheckpointError("LB0114", "the model has no such layer", where=path)

    def _process_model_after_weight_loading(self, model: nn.Module, **unused: Any) -> nn.Module:
        for path, layer in model.named_modules():
            if isinstance(layer, QuantLinear):
                _check_loaded(path, layer)
                layer.prepare()
        prepare_experts(model)
        config: Any = model.config
        config.__class__ = hf_config.guarded(config.__class__)
        if self.quantization_config.kv:
            model.kv_format = self.quantization_config.kv  # type: ignore[assignment]
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """None where experts are layers: their tensors have the names of the modules, and are not to be stacked."""
        return [] if self.quantization_config.experts else weight_conversions

    def is_serializable(self) -> bool:
        """Saved as it was loaded."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Weights are codes; there is nothing to train."""
        return False

    @property
    def is_compileable(self) -> bool:
        """The layers are one torch operator each."""
        return True


def _swap(model: nn.Module, path: str, fmt: WeightFormat, given: native.StoredInput) -> None:
    old = model.get_submodule(path)
    if not isinstance(old, nn.Linear):
        raise CheckpointError("LB0114", f"is a {type(old).__name__}, not a linear layer", where=path)
    bias = old.bias is not None
    size, more = (old.in_features, old.out_features), {"activation": given.activation, "rotate": given.rotate}
    new = QuantLinear(*size, fmt, bias, device="meta", dtype=old.weight.dtype, **more)  # type: ignore[arg-type]
    new.requires_grad_(False)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def _check_loaded(path: str, layer: QuantLinear) -> None:
    """transformers fills tensors that a file lacks with anything; the stored shape shows whether they were there."""
    shape = layer._buffers.get("weight_shape")
    expected = [layer.out_features, layer.in_features]
    if shape is None or shape.device.type == "meta" or shape.tolist() != expected:
        raise CheckpointError("LB0114", "the checkpoint has no weights for this layer", where=path)


def register() -> None:
    """Make transformers know `quant_method: lowbit` and `model_type: lowbit`; does nothing the second time."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("lowbit", LowbitQuantizationConfig)
    AUTO_QUANTIZER_MAPPING.setdefault("lowbit", LowbitHfQuantizer)
    hf_config.register()
