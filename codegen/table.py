"""`TableSpec`: rows of a quantized matrix, looked up by number: the embedding table, in the layout of linear layers."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache, cached_property

from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError
from lowbit.quantizers.formats import Format

__all__ = ["TableSpec", "parse_table_spec"]


@dataclass(frozen=True)
class TableSpec:
    """ids -> float32 rows of a packed matrix [rows, k]. Formats have one code per weight, in the matrix's own order."""

    rows: int
    k: int
    format: str
    layout: str

    def __post_init__(self) -> None:
        fmt = self.linear.weight_format
        if not isinstance(fmt, Format) or fmt.ordered or fmt.terms > 1 or fmt.element.window > 1:
            raise KernelError(
                "LB0431", f"rows of {self.format} are not looked up", hint="use a format such as int8.ch.sym"
            )

    @cached_property
    def linear(self) -> KernelSpec:
        """The spec of the linear layer with the same matrix, whose operands the table has."""
        return KernelSpec((self.rows,), self.k, self.format, self.layout, "float")

    def key(self) -> str:
        """Canonical JSON: equal specs, equal text."""
        return json.dumps({"table": asdict(self)}, sort_keys=True, separators=(",", ":"))


@cache
def parse_table_spec(key: str) -> TableSpec:
    """The spec written as canonical JSON by `TableSpec.key`."""
    return TableSpec(**json.loads(key)["table"])
