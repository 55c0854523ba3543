"""House rules a machine can check: file length, docstrings of public names, and the catalogue of errors."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for folder in ("compiler", "passes", "codegen", "quantizers", "src/lowbit")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not (folder == "src/lowbit" and (ROOT / folder / path.relative_to(ROOT / folder).parts[0]).is_symlink())
]
CODE = re.compile(r"\bLB\d{4}\b")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_files_stay_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= 600, f"{name_of(path)} has {lines} lines; split it"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    public = exported(tree)
    missing = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public and not ast.get_docstring(node)
    ]
    assert not missing, f"{name_of(path)}: no docstring on {missing}"


def exported(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return set(ast.literal_eval(node.value))
    return set()


def raised_codes() -> set[str]:
    """Codes given to an exception anywhere in the sources (not those only mentioned in comments and docstrings)."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                for arg in [*node.args, *(k.value for k in node.keywords)]:
                    if isinstance(arg, ast.Constant) and isinstance(arg.value, str) and CODE.fullmatch(arg.value):
                        found.add(arg.value)
    return found


def documented_codes() -> list[str]:
    return re.findall(r"^\| (LB\d{4}) \|", (ROOT / "docs" / "errors.md").read_text(), flags=re.M)


def test_every_error_code_is_documented() -> None:
    missing = raised_codes() - set(documented_codes())
    assert not missing, f"docs/errors.md lacks {sorted(missing)}"


def test_no_documented_error_code_is_gone() -> None:
    stale = set(documented_codes()) - raised_codes()
    assert not stale, f"docs/errors.md lists {sorted(stale)}, which nothing raises"


def test_documented_codes_are_sorted_and_unique() -> None:
    codes = documented_codes()
    assert codes == sorted(set(codes))


def test_codes_mentioned_in_docs_exist() -> None:
    raised = raised_codes()
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        unknown = set(CODE.findall(path.read_text())) - raised
        assert not unknown, f"{name_of(path)} mentions {sorted(unknown)}"
