"""Generated kernels compile for GPUs that are not here, without spills and with the instructions meant."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

import pytest

from lowbit.codegen.backend import Source
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.backend import TritonBackend
from lowbit.codegen.triton.model import shared_bytes
from lowbit.codegen.triton.offline import OfflineReport, attempt_offline
from lowbit.compiler.errors import KernelError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

WORDS, VECTORS = str(LAYOUTS["words"]), str(LAYOUTS["vectors"])


@dataclass(frozen=True)
class Job:
    """One kernel and where it should run."""

    arch: str
    fmt: str
    schedule: Schedule
    compute: str = "float"
    x: str = "bf16"
    epilogue: tuple[str, ...] = ()

    def __str__(self) -> str:
        s = self.schedule
        kind = "gemv" if s.get("gemv", 0) else ("swap" if s.get("swap", 0) else "dot")
        return f"{self.arch}-{self.fmt}-{self.compute}-{self.x}-{kind}{s.tile_m}x{s.tile_n}x{s.tile_k}"

    @property
    def spec(self) -> KernelSpec:
        segments = (4096, 4096) if "silu_mul" in self.epilogue else (4096,)
        layout = VECTORS if self.vector else WORDS
        return KernelSpec(segments, 4096, self.fmt, layout, self.compute, self.x, self.x, self.epilogue)  # type: ignore[arg-type]

    @property
    def vector(self) -> bool:
        return self.fmt.startswith("vq")

    @property
    def matrix(self) -> bool:
        return not self.schedule.get("gemv", 0)


GATED = ("bias", "silu_mul", "residual")
JOBS = [
    Job("sm_80", "int4.g128.sym", Schedule(16, 64, 128, 4, 4, 2).with_extra(scale_after=1, evict_first=1)),
    Job("sm_90", "int4.g128.sym", Schedule(16, 64, 128, 4, 4, 4).with_extra(scale_after=1, swap=1)),
    Job("sm_90", "int4.g128.sym", Schedule(64, 128, 64, 8, 3), epilogue=GATED),
    Job("sm_90", "int3.g64.asym", Schedule(1, 32, 256, 4, 2, 2).with_extra(gemv=1, scale_after=1)),
    Job("sm_80", "int4.g128.sym", Schedule(64, 64, 32, 4, 3), compute="int8"),
    Job("sm_80", "int2.g64.fz", Schedule(16, 64, 64, 4, 4, 2).with_extra(evict_first=1)),
    Job("sm_90", "int2.g64.fz", Schedule(1, 32, 64, 4, 2, 2).with_extra(gemv=1, scale_after=1)),
    Job("sm_90", "e3m2.ch", Schedule(1, 64, 128, 4, 4).with_extra(gemv=1, scale_after=1)),
    Job("sm_80", "e2m1.g16.e4m3.t32", Schedule(16, 64, 128, 4, 4, 2).with_extra(evict_first=1)),
    Job("sm_90", "tcq2.g64", Schedule(1, 32, 64, 4, 2, 2).with_extra(gemv=1, scale_after=1)),
    Job("sm_80", "tcq3.ch", Schedule(16, 64, 64, 4, 4, 2)),
    Job("sm_80", "vq.d4.k256", Schedule(16, 64, 64, 4, 3, 4)),
    Job("sm_90", "vq.d4.k256", Schedule(1, 64, 64, 4, 2, 4).with_extra(gemv=1)),
    Job("sm_80", "vq.d8.k256.r256", Schedule(4, 64, 64, 4, 2, 4).with_extra(gemv=1)),
    Job("sm_90", "vq.d8.k256.r256", Schedule(64, 128, 64, 8, 3), epilogue=GATED),
    Job("sm_80", "vq.d8.k4096", Schedule(64, 64, 64, 4, 3)),
    Job("sm_90", "vq.d8.k4096", Schedule(16, 128, 64, 4, 3).with_extra(swap=1)),
    Job("sm_90", "vq.d6.k4096.c4.o2pv4k4096.cn", Schedule(128, 128, 64, 8, 3)),
    Job("sm_90", "vq.d8.k256.r256.in.rn", Schedule(64, 128, 64, 8, 3), epilogue=GATED),
    Job("sm_80", "vq.d8.k65536.in.rn", Schedule(1, 64, 64, 4, 2, 4).with_extra(gemv=1)),
]


BROKEN = (
    "import triton\nimport triton.language as tl\n"
    "ARGS = {'x_ptr': '*fp32'}\nPREPARE_ARGS = {}\nOPTIONS = {'num_warps': 4}\n"
    "@triton.jit\ndef kernel(x_ptr):\n    tl.store(x_ptr + tl.arange(0, 3), 1.0)\n"
)


@pytest.fixture(scope="module")
def results() -> list[list[OfflineReport] | KernelError]:
    """Of all jobs and of a broken kernel: starting the compiling process takes longer than a kernel."""
    backend = TritonBackend()
    sources = [(backend.emit(j.spec, j.schedule, Target.parse(j.arch)), j.arch) for j in JOBS]
    return attempt_offline([*sources, (Source(BROKEN, ".py"), "sm_90")])


@pytest.fixture(scope="module")
def reports(results: list[list[OfflineReport] | KernelError]) -> dict[str, list[OfflineReport]]:
    assert all(isinstance(r, list) for r in results[:-1]), results
    return {str(job): r for job, r in zip(JOBS, results, strict=False) if isinstance(r, list)}


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_fits_the_registers(job: Job, reports: dict[str, list[OfflineReport]]) -> None:
    for report in reports[str(job)]:
        assert report.spills == 0
        assert 0 < report.registers <= 255
        assert report.cubin_bytes > 1000
        assert f".target {job.arch}" in report.ptx


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_uses_matrix_instructions_where_meant(job: Job, reports: dict[str, list[OfflineReport]]) -> None:
    main = reports[str(job)][0]
    assert (main.matrix_instructions > 0) == job.matrix
    if job.compute == "int8":
        assert main.count("IMMA") > 0
    wide = job.schedule.tile_n if job.schedule.get("swap", 0) else job.schedule.tile_m
    if job.arch == "sm_90" and job.matrix and wide >= 64:
        assert main.count("HGMMA") > 0


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_decodes_without_conversions_or_doubles(job: Job, reports: dict[str, list[OfflineReport]]) -> None:
    """Weights become floats by bit operations: conversions would occur once a weight, not once a scale group."""
    main = reports[str(job)][0]
    assert not [name for name in main.sass if "F64" in name or name.startswith(("DFMA", "DADD", "DMUL"))]
    if job.compute == "float":
        decoded = job.schedule.tile_n * job.schedule.tile_k // (32 * job.schedule.warps)
        assert main.count("I2F") < decoded / 4


@pytest.mark.parametrize("job", JOBS, ids=str)
def test_shared_memory_estimate_is_an_upper_bound(job: Job, reports: dict[str, list[OfflineReport]]) -> None:
    estimate = shared_bytes(job.spec, job.schedule, Target.parse(job.arch))
    measured = reports[str(job)][0].shared_bytes
    assert measured <= 1.1 * estimate + 2048
    if job.matrix:
        assert estimate <= 2 * measured


@pytest.mark.parametrize("job", [job for job in JOBS if job.vector], ids=str)
def test_a_centroid_is_one_load(job: Job, reports: dict[str, list[OfflineReport]]) -> None:
    """Vectors of a power of two, 16 bytes at most, are fetched whole: as many wide loads as the tile has vectors."""
    fmt = job.spec.vector
    assert fmt is not None
    if fmt.outliers or job.epilogue:
        return  # outliers and residuals of the epilogue are loaded in other widths
    books = 2 if fmt.residual else 1
    vectors = books * job.schedule.tile_n * job.schedule.tile_k // fmt.dim // (32 * job.schedule.warps)
    width = f"{16 * fmt.dim}"
    main = reports[str(job)][0]
    assert sum(n for name, n in main.sass.items() if name.startswith("LDG") and width in name) >= vectors
    assert "LDL" not in "".join(main.sass)


def test_activations_are_prepared_by_a_kernel_of_their_own(reports: dict[str, list[OfflineReport]]) -> None:
    job = next(j for j in JOBS if j.compute == "int8")
    assert [r.kernel for r in reports[str(job)]] == ["kernel", "prepare"]
    ordered = next(j for j in JOBS if j.vector and ".c4" in j.fmt)
    assert [r.kernel for r in reports[str(ordered)]] == ["kernel", "prepare"]


def test_mask_and_exponent_are_one_instruction(reports: dict[str, list[OfflineReport]]) -> None:
    """Counted where scales multiply sums: LOP3, FADD and half a conversion a weight."""
    job = JOBS[1]
    weights = job.schedule.tile_n * job.schedule.tile_k // (32 * job.schedule.warps)
    assert reports[str(job)][0].count("LOP3") < 2 * weights


def test_compiler_errors_name_the_kernel(results: list[list[OfflineReport] | KernelError]) -> None:
    error = results[-1]
    assert isinstance(error, KernelError)
    assert error.code == "LB0441"
    assert "sm_90" in str(error)
    assert "power of 2" in str(error)
