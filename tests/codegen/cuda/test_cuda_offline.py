"""Kernels compile for GPUs that are not here: no spills, tensor cores, few instructions; compared with the baseline."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lowbit.codegen.cuda.offline import CudaReport, _functions, inspect, loop_of
from lowbit.codegen.cuda.toolchain import compile_cubin, find_nvcc, find_tool, nvcc_version
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.errors import KernelError

BENCH = Path(__file__).resolve().parents[3] / "bench"
pytestmark = pytest.mark.skipif(find_nvcc() is None or find_tool("cuobjdump") is None, reason="no nvcc or cuobjdump")

QUICK = ("sm_90 int4.g128.sym bf16 m1", "sm_80 int4.g128.sym f16 m1", "sm_90 int4.g128.sym bf16 m128",
         "sm_90 int8.ch.sym int8.token m128", "sm_90 vq.d4.k256 bf16 m8",
         "sm_89 int4.g64.sym.perm int4.g64.w2.asym m64 s4")  # fmt: skip
ARITHMETIC = {"sm_80 int4.g128.sym f16 m1": 1.25, "sm_80 int2.g64.asym f16 m1": 1.4,
              "sm_90 int2.g64.asym f16 m1": 1.4, "sm_90 int2.g64.asym f16 m1 tall": 1.3}  # fmt: skip
"""Integer and float instructions for each weight, everything in the main loop included."""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    import offline  # type: ignore[import-not-found]

    return offline  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubins")


def matrix_instruction(spec: KernelSpec, schedule: Schedule) -> str:
    if spec.compute == "int8":
        return "IGMMA" if schedule.get("wgmma", 0) else "IMMA"
    if schedule.get("fp8", 0):
        return "QGMMA"
    return "HGMMA" if schedule.get("wgmma", 0) else "HMMA"


def check(offline: ModuleType, name: str, folder: Path) -> None:
    job = offline.jobs()[name]
    (report,) = inspect([job], folder)
    assert report.spills == 0
    assert report.stack == 0
    assert set(report.matrix) == {matrix_instruction(*job[:2])}
    if job[1].get("s4", 0):
        assert report.count("IMMA.16864.S4.U4") == report.matrix["IMMA"]
    assert report.count("UTMALDG" if job[1].get("wgmma", 0) else "LDSM" if job[0].vector else "LDGSTS.E.BYPASS.128")
    assert report.count("LDL", "STL") == 0
    assert report.decode <= ARITHMETIC.get(name, report.decode)
    baseline = json.loads((BENCH / "results" / "offline.json").read_text())
    known = baseline["kernels"]
    assert name in known or name not in QUICK
    if baseline["toolchain"] == nvcc_version() and name in known:  # `bench/offline.py --write` adds the others
        assert offline.regressions(known[name], report.summary()) == []


@pytest.mark.parametrize("name", QUICK)
def test_kernels_compile_as_meant(name: str, offline: ModuleType, folder: Path) -> None:
    check(offline, name, folder)


@pytest.mark.slow
def test_all_kernels_compile_as_meant(offline: ModuleType, folder: Path) -> None:
    for name in offline.jobs():
        check(offline, name, folder)


def summary(**changes: Any) -> dict[str, Any]:
    report = CudaReport("sm_90", 100, 0, 0, 1000, 9000, {"HMMA.16816": 4, "LDS.128": 2}, {"LOP3.LUT": 8}, 8)
    return {**report.summary(), **changes}


@pytest.mark.parametrize(
    "worse",
    [
        {"spills": 4},
        {"registers": 130},
        {"matrix_instructions": {}},
        {"arithmetic_per_weight": 1.2},
        {"wide_shared_loads": 0},
    ],
    ids=str,
)
def test_a_regression_is_noticed(worse: dict[str, Any], offline: ModuleType) -> None:
    assert offline.regressions(summary(), summary()) == []
    assert offline.regressions(summary(), summary(**worse))


def test_the_main_loop_is_the_one_that_multiplies() -> None:
    lines = [(0, "MOV", ""), (16, "LOP3.LUT", ""), (32, "HMMA.16816", ""), (48, "BRA", " 0x10"), (64, "IADD3", ""),
             (80, "BRA", " 0x40"), (96, "BRA", " 0x0")]  # fmt: skip
    assert [name for _, name, _ in loop_of(lines)] == ["LOP3.LUT", "HMMA.16816", "BRA"]
    assert loop_of(lines[:1]) == []


def test_kernels_of_a_file_are_told_apart() -> None:
    """Each has addresses of its own: the loop of one is not found in another's instructions."""
    sass = """
\t\tFunction : lb_prepare
        /*0000*/                   LDG.E R2, [R4] ;                    /* 0x01 */
        /*0010*/              @!P0 BRA 0x0 ;                           /* 0x02 */
\t\tFunction : lb_kernel
        /*0000*/                   HMMA.16816.F32 R4, R8, R2, RZ ;     /* 0x03 */
        /*0010*/               @P1 BRA 0x0 ;                           /* 0x04 */
"""
    found = _functions(sass)
    assert {name: [op for _, op, _ in lines] for name, lines in found.items()} == {
        "lb_prepare": ["LDG.E", "BRA"], "lb_kernel": ["HMMA.16816.F32", "BRA"],
    }  # fmt: skip
    assert [op for _, op, _ in loop_of(found["lb_kernel"])] == ["HMMA.16816.F32", "BRA"]
    assert loop_of(found["lb_prepare"]) == []


def test_compiler_errors_are_shown(tmp_path: Path) -> None:
    (tmp_path / "bad.cu").write_text("__global__ void f() { this is no code }")
    with pytest.raises(KernelError, match=r"(?s)LB0464.*error"):
        compile_cubin(tmp_path / "bad.cu", ("-cubin",), tmp_path / "bad.cubin")
