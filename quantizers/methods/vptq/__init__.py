"""VPTQ: vector quantization with second-order error feedback. See `vptq.py` for the method, the rest are its parts."""

from __future__ import annotations

from lowbit.quantizers.methods.vptq.vptq import Vptq

__all__ = ["Vptq"]
