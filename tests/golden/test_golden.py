"""Golden IR tests: one file per case with the passes, the input, and what must come out.

A file reads `// PASSES: a,b{x=1}`, IR, a line `// -----`, IR. `pytest --update-golden` rewrites the second half.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.pipeline import PASSES, parse_module, print_module, run_pipeline
from lowbit.passes.session import PassContext
from lowbit.quantizers.formats import Format

CASES = sorted((Path(__file__).parent / "cases").glob("*.mlir"))
SEPARATOR = "// -----\n"


class FakeSession:
    """Stands in for a model: says what it was asked."""

    def __init__(self) -> None:
        self.packed: list[tuple[tuple[str, ...], str, tuple[str, ...]]] = []

    def quantize(self, path: str, fmt: Format) -> str:
        return f"fake {path} as {fmt}"

    def pack(self, paths: tuple[str, ...], layout: str, epilogue: tuple[str, ...]) -> None:
        self.packed.append((paths, layout, epilogue))

    def connect(self, paths: tuple[str, ...], reader: str) -> None:
        raise AssertionError("no case rounds and packs")

    def build(self, specs: Sequence[KernelSpec]) -> list[str]:
        return [f"fake kernel {s.k}x{s.n_out}" for s in specs]


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_case(path: Path, request: pytest.FixtureRequest) -> None:
    head, _, rest = path.read_text().partition("\n")
    source, _, expected = rest.partition(SEPARATOR)
    assert head.startswith("// PASSES: ")
    module = parse_module(source, str(path))
    run_pipeline(module, head.removeprefix("// PASSES: "), PassContext.create(FakeSession()))
    got = print_module(module)
    if request.config.getoption("--update-golden"):
        path.write_text(f"{head}\n{source}{SEPARATOR}{got}")
        return
    assert got == expected
    assert print_module(parse_module(got)) == got


def test_every_pass_has_a_case() -> None:
    assert {c.stem.split(".")[0] for c in CASES} == set(PASSES)
