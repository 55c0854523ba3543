"""A decoder-only model as one native program: a whole step is one call."""

from __future__ import annotations

from lowbit.compiler.runtime.program.cache import ProgramCache
from lowbit.compiler.runtime.program.engine import DecoderProgram
from lowbit.compiler.runtime.program.install import check_program, compile_program

__all__ = ["DecoderProgram", "ProgramCache", "check_program", "compile_program"]
