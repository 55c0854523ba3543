"""IR <-> text, and verification with messages a person can place."""

from __future__ import annotations

import re
from io import StringIO

from xdsl.context import Context
from xdsl.dialects.builtin import Builtin, ModuleOp
from xdsl.ir import Operation
from xdsl.parser import Parser
from xdsl.printer import Printer
from xdsl.utils.exceptions import ParseError, VerifyException

from lowbit.compiler.errors import IRError
from lowbit.compiler.ir.graph import LB, path_of
from lowbit.compiler.ir.kernel import LBK

__all__ = ["new_context", "parse_module", "print_module", "verify_module"]


def new_context() -> Context:
    """A context that knows the builtin, `lb` and `lbk` dialects."""
    ctx = Context()
    for dialect in (Builtin, LB, LBK):
        ctx.load_dialect(dialect)
    return ctx


def parse_module(text: str, where: str = "<text>") -> ModuleOp:
    """Parse and verify IR text; raises IRError (LB0301) with the place and the parser's caret line."""
    try:
        module = Parser(new_context(), text, where).parse_module()
    except (ParseError, VerifyException) as e:
        raise IRError("LB0301", f"cannot parse: {e}", where=where) from e
    verify_module(module)
    return module


def print_module(module: Operation) -> str:
    """Text that `parse_module` reads back to an equal module."""
    stream = StringIO()
    Printer(stream, print_debuginfo=True).print_op(module)
    # Unknown locations say nothing; parsing restores them.
    return re.sub(r" ?loc\(unknown\)(?=$|,|\)| \{)", "", stream.getvalue(), flags=re.M) + "\n"


def verify_module(module: Operation, after: str = "") -> None:
    """Raise IRError (LB0302) listing every operation that is not valid, each with the model's module path."""
    problems: list[str] = []
    for op in module.walk():
        try:
            op.verify(verify_nested_ops=False)
        except VerifyException as e:
            place = f" [{path}]" if (path := path_of(op)) else ""
            problems.append(f"{op.name}{place}: {str(e).strip().splitlines()[-1]}")
    if problems:
        when = f" after pass {after}" if after else ""
        raise IRError("LB0302", f"{len(problems)} invalid operations{when}: " + "; ".join(problems[:8]))
