"""Commands that need no model: formats, schemes, passes, opt, doctor, help and version."""

from __future__ import annotations

from pathlib import Path

import pytest
from _cli import error_line, invoke, invoke_json

import lowbit
from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.quantizers.formats import catalog, parse_format, vector_catalog
from lowbit.quantizers.scheme import PRESETS

COMMANDS = ("run", "plan", "eval", "inspect", "formats", "schemes", "opt", "passes", "tune", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_help_names_exit_codes_and_commands() -> None:
    out = invoke("--help").stdout
    assert all(command in out for command in COMMANDS)
    assert "Exit codes" in out


def test_version() -> None:
    assert invoke("--version").stdout.strip() == f"lowbit {lowbit.__version__}"


def test_formats_lists_the_whole_catalogue() -> None:
    rows = invoke_json("formats")["formats"]
    scalars = [r for r in rows if r["element"] != "vq" and not r["element"].startswith(("bcq", "tcq"))]
    kinds = [(f.element.name, "code" if f.zero else "float" if f.offset else "no") for f in catalog()]
    assert [(r["element"], r["zero"]) for r in scalars] == kinds
    assert [r["example"] for r in rows if r["element"].startswith("bcq")] == ["bcq2.g64", "bcq3.g64", "bcq4.g64"]
    assert [r["example"] for r in rows if r["element"].startswith("tcq")] == [f"tcq{b}.g64" for b in range(1, 5)]
    assert [r["example"] for r in rows if r["element"] == "vq"] == [str(f) for f in vector_catalog()]
    for row in rows:
        fmt = parse_format(row["example"])
        assert row["bits_per_weight"] == pytest.approx(fmt.bits_per_weight(4096, 4096))
        assert "reference" in row["backends"]
    exported = {r["example"]: r["export"] for r in rows}
    assert exported["int4.g64.sym"] == "compressed-tensors"
    assert exported["int1.g64.sym"] == "lowbit"


def test_formats_in_a_pipe_are_plain_lines() -> None:
    out = invoke("formats").stdout
    assert out.splitlines()[0].split()[:2] == ["element", "bits"]
    assert not set("│┃━") & set(out)


def test_schemes_lists_the_presets() -> None:
    document = invoke_json("schemes")
    assert [s["name"] for s in document["schemes"]] == list(PRESETS)
    assert document["default"] in PRESETS


def test_passes_lists_the_pipeline() -> None:
    from lowbit.compiler.pipeline import PASSES

    rows = invoke_json("passes")["passes"]
    assert [r["name"] for r in rows] == list(PASSES)
    assert all(r["summary"] for r in rows)
    assert {"target"} <= set(next(r for r in rows if r["name"] == "choose-layout")["options"])


def test_doctor_reports_and_advises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "missing-compiler"))
    document = invoke_json("doctor")
    checks = {c["name"]: c for c in document["checks"]}
    assert {"python", "cpu", "torch", "transformers", "c++ compiler", "gpu", "kernel cache", "disk"} <= set(checks)
    assert checks["c++ compiler"]["status"] == "missing"
    assert "CXX" in checks["c++ compiler"]["fix"]
    assert checks["kernel calls"]["status"] == ("missing" if find_compiler() is None else "ok")
    assert all(c["fix"] for c in document["checks"] if c["status"] == "bad")


def test_doctor_refuses_a_cache_it_cannot_write(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("LOWBIT_CACHE", str(blocked / "cache"))
    checks = {c["name"]: c for c in invoke_json("doctor")["checks"]}
    assert checks["kernel cache"]["status"] == "missing"


def golden_input() -> str:
    """The input half of a golden case."""
    case = Path(__file__).parents[1] / "golden" / "cases" / "fuse-siblings.mlir"
    lines = case.read_text().split("// -----")[0].splitlines()
    return "\n".join(line for line in lines if not line.startswith("//")) + "\n"


def test_opt_runs_passes_on_text(tmp_path: Path) -> None:
    from lowbit.compiler.pipeline import parse_module, print_module, run_pipeline

    file = tmp_path / "in.mlir"
    file.write_text(golden_input())
    module = parse_module(golden_input())
    assert invoke("opt", file).stdout == print_module(module)
    run_pipeline(module, "fuse-siblings")
    assert invoke("opt", file, "--passes", "fuse-siblings").stdout == print_module(module)
    assert invoke_json("opt", file, "-p", "fuse-siblings")["module"] == print_module(module)


def test_opt_prints_times_and_dumps(tmp_path: Path) -> None:
    file, dump = tmp_path / "in.mlir", tmp_path / "dump"
    file.write_text(golden_input())
    options = ("--passes", "canonicalize,fuse-siblings", "--print-after", "canonicalize", "--time-passes")
    result = invoke("opt", file, *options, "--dump-ir", dump)
    assert result.exit_code == 0, result.stderr
    assert "// after canonicalize" in result.stderr
    assert "// after fuse-siblings" not in result.stderr
    assert result.stderr.count(" ms ") == 2
    names = ["00-input.mlir", "01-canonicalize.mlir", "02-fuse-siblings.mlir"]
    assert sorted(p.name for p in dump.iterdir()) == names
    assert (dump / names[-1]).read_text() == result.stdout


@pytest.mark.parametrize(
    ("content", "passes", "code"),
    [
        ("not ir", "", "LB0301"),
        (None, "", "LB0350"),
        ("", "no-such-pass", "LB0303"),
        ("", "choose-layout{colour=red}", "LB0303"),
    ],
)
def test_opt_refuses(tmp_path: Path, content: str | None, passes: str, code: str) -> None:
    file = tmp_path / "in.mlir"
    if content is not None:
        file.write_text(content or golden_input())
    assert f"error {code}" in error_line(invoke("opt", file, "--passes", passes))


def test_opt_refuses_a_pass_that_needs_weights(tmp_path: Path) -> None:
    file = tmp_path / "in.mlir"
    file.write_text(golden_input())
    assert "error LB0310" in error_line(invoke("opt", file, "--passes", "pack"))


def test_usage_errors_exit_with_2() -> None:
    assert invoke("run").exit_code == 2
    assert invoke("no-such-command").exit_code == 2
    assert invoke("eval", "model", "--text", "x", "--windows", "0").exit_code == 2
