"""Runs the PTX of a kernel on the CPU: a slow oracle for what compilers make of inline assembly, lanes and barriers."""

from __future__ import annotations

from _ptx.errors import PtxError
from _ptx.launch import Arg, Loaded, Struct, run_ptx
from _ptx.tensor_map import TensorMap

__all__ = ["Arg", "Loaded", "PtxError", "Struct", "TensorMap", "run_ptx"]
