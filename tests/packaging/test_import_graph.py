"""The rules of imports: dependencies point one way, without cycles, and only the name `lowbit` is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"compiler": "lowbit.compiler", "passes": "lowbit.passes", "codegen": "lowbit.codegen",
           "quantizers": "lowbit.quantizers", "src/lowbit": "lowbit"}  # fmt: skip
BARE = ("compiler", "passes", "codegen", "quantizers")

# From the bottom up. A module may import from its own layer and from those before it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("lowbit.compiler.errors",),
    ("lowbit.compiler.ir",),
    ("lowbit.quantizers.formats",),
    ("lowbit.quantizers",),
    ("lowbit.codegen",),
    ("lowbit.passes",),
    ("lowbit.compiler",),
    ("lowbit.api",),
    ("lowbit.commands", "lowbit.cli"),
)


def modules() -> dict[str, Path]:
    """Dotted name -> file, each file once (the links in src/lowbit are not entered)."""
    found = {}
    for folder, package in FOLDERS.items():
        base = ROOT / folder
        for path in sorted(base.rglob("*.py")):
            parts = path.relative_to(base).parts
            if folder == "src/lowbit" and (base / parts[0]).is_symlink():
                continue
            name = ".".join([package, *parts[:-1], path.stem])
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imports(name: str, *, runtime_only: bool = True, top_level: bool = False) -> set[str]:
    """Names of lowbit modules that `name` imports; type-checking-only imports are left out."""
    tree = ast.parse(MODULES[name].read_text())
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test) and runtime_only:
            for child in node.orelse:
                visit(child)
            return
        if top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import in line {node.lineno}"
            module = node.module or ""
            found.update(
                f"{module}.{alias.name}" if f"{module}.{alias.name}" in MODULES else module for alias in node.names
            )
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def layer(name: str) -> int:
    """The layer of a module: that of its longest listed prefix."""
    best = max(
        ((len(prefix), i) for i, prefixes in enumerate(LAYERS) for prefix in prefixes
         if name == prefix or name.startswith(prefix + ".")),
        default=(0, -1),
    )  # fmt: skip
    return best[1]


def test_every_module_is_found_once() -> None:
    assert {"lowbit", "lowbit.cli", "lowbit.compiler.errors", "lowbit.codegen.spec"} <= set(MODULES)
    assert len(set(MODULES.values())) == len(MODULES)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_down(name: str) -> None:
    """A lower layer never imports a higher one, not even inside a function."""
    if name in ("lowbit", "lowbit._hook"):
        return  # the public names, resolved on first use
    upward = {i for i in imports(name) if i.startswith("lowbit.") and layer(i) > layer(name)}
    assert not upward, f"{name} (layer {LAYERS[layer(name)]}) imports upwards: {sorted(upward)}"


def test_no_import_cycles() -> None:
    """Among imports that run when a module is loaded."""
    graph = {name: {i for i in imports(name, top_level=True) if i in MODULES and i != name} for name in MODULES}
    done: set[str] = set()
    path: list[str] = []

    def walk(name: str) -> None:
        if name in done:
            return
        assert name not in path, "cycle: " + " -> ".join([*path[path.index(name) :], name])
        path.append(name)
        for other in sorted(graph[name]):
            walk(other)
        done.add(path.pop())

    for name in sorted(graph):
        walk(name)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_bare_names_are_never_imported(name: str) -> None:
    wrong = {i for i in imports(name, runtime_only=False) if i.split(".")[0] in BARE}
    assert not wrong, f"{name} imports {sorted(wrong)}: say lowbit.{sorted(wrong)[0]}"


def test_tests_and_benchmarks_use_the_package_name() -> None:
    for folder in ("tests", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                assert not any(n.split(".")[0] in BARE for n in names), f"{path}: bare import {names}"


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


HEAVY = "('torch', 'triton', 'transformers', 'xdsl', 'numpy')"


def test_import_lowbit_is_light() -> None:
    code = f"import lowbit, sys; print([m for m in {HEAVY} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_command_line_is_light_until_a_command_runs() -> None:
    code = f"import lowbit.cli, sys; print([m for m in {HEAVY} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_importing_lowbit_leaves_no_bare_package_names() -> None:
    code = f"import lowbit.compiler.errors, sys; print([m for m in {BARE!r} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_public_names_resolve() -> None:
    code = "import lowbit; [getattr(lowbit, n) for n in lowbit.__all__]; print('ok')"
    assert run_python(code) == "ok"
