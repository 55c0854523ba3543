"""GPU kernels: check, tune, compare with peers. One resumable run, in stages; see `gpu.sh`.

    python bench/kernels.py --out DIR [--backend cuda] [--stage STAGE] [--seconds S]
    python bench/kernels.py --dry-run [--arch sm_90]        # no GPU: the grid, and a few kernels compiled offline

Every stage writes `DIR/<stage>.json` and is skipped when that file says it is complete; `tune` and `compare` save after
every matrix and go on where they stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import kernel_cases
import torch
from kernel_cases import (
    ERROR_LIMIT,
    TOKENS,
    Problem,
    copies_of,
    dequantize,
    problems,
    random_weight,
    relative_error,
    seconds_per_call,
)
from kernel_peers import PEERS, prepare

from lowbit.codegen import load_backend
from lowbit.codegen.backend import Backend, Launcher
from lowbit.codegen.cuda.plan import Plan
from lowbit.codegen.cuda.space import illegal as illegal_plan
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.triton.space import illegal as illegal_triton
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.qtensor import PackedWeight

STAGES = ("environment", "check", "tune", "compare")
SHORTLIST = 12  # schedules measured for each (matrix, tokens)
CUDA_FEATURES = ("row_warps", "exact"), ("row_warps", "exact", "resident", "warps", "tile_k", "stages")
TRITON_FEATURES = ("gemv", "swap"), ("gemv", "swap", "split_k", "warps")


def backend_of(spec: KernelSpec) -> Backend:
    """The backend whose layout the weights are in."""
    return load_backend("cuda" if spec.layout_ == LAYOUTS["fragments"] else "triton")


def illegal(spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
    """Why a schedule cannot run, or None."""
    if backend_of(spec).name == "cuda":
        return illegal_plan(Plan(spec, schedule), target)
    return illegal_triton(spec, schedule, target)


class OutOfTime(Exception):
    """The run's time is used up; the next run goes on from here."""


class Run:
    """A folder of results and a deadline."""

    def __init__(self, out: Path, seconds: float, formats: Sequence[str] = (), backend: str = "triton") -> None:
        self.out = out
        self.formats = formats
        self.backend = backend
        self.deadline = time.monotonic() + seconds
        out.mkdir(parents=True, exist_ok=True)

    def problems(self) -> list[Problem]:
        """The grid, or its part in the formats asked for."""
        grid = problems() if self.backend == "triton" else problems(self.backend)
        return [p for p in grid if not self.formats or p.fmt in self.formats]

    def need(self, seconds: float) -> None:
        """Raise OutOfTime when less than `seconds` are left."""
        if time.monotonic() + seconds > self.deadline:
            raise OutOfTime

    def read(self, stage: str) -> dict[str, Any]:
        """A stage's stored results, or an empty incomplete one."""
        path = self.out / f"{stage}.json"
        return json.loads(path.read_text()) if path.exists() else {"stage": stage, "complete": False}

    def write(self, stage: str, result: dict[str, Any]) -> None:
        """Store a stage's results at once or not at all."""
        path = self.out / f"{stage}.json"
        staged = path.with_suffix(".tmp")
        staged.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
        os.replace(staged, path)


def environment(run: Run) -> dict[str, Any]:
    """Machine, versions and the two ceilings everything is compared with: copy bandwidth and a bf16 product."""
    p = torch.cuda.get_device_properties(0)
    a, b = (torch.randn(8192, 8192, device=kernel_cases.DEVICE, dtype=torch.bfloat16) for _ in range(2))
    product = seconds_per_call([lambda: torch.mm(a, b)])
    source = torch.empty(1 << 30, dtype=torch.int32, device=kernel_cases.DEVICE).random_()
    target = torch.empty_like(source)
    copy = seconds_per_call([lambda: target.copy_(source)])
    read = seconds_per_call([lambda: source.sum()])
    return {
        "gpu": p.name,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": p.multi_processor_count,
        "l2_bytes": p.L2_cache_size,
        "memory_bytes": p.total_memory,
        "copy_bytes_per_s": 2 * source.nbytes / copy,
        "read_bytes_per_s": source.nbytes / read,
        "bf16_flops_per_s": 2 * 8192**3 / product,
        "python": platform.python_version(),
        "versions": {
            name: _version(name) for name in ("torch", "triton", "numpy", "xdsl", "humming-kernels", "gemlite")
        },
        "timing": "median of CUDA graph replays over rotating weight copies (cold L2), seconds per call",
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def shortlist(spec: KernelSpec, target: Target, m: int, count: int = SHORTLIST) -> list[Schedule]:
    """The predicted best schedule of every kind (tiles and way of multiplying), then the best left of every kind.

    The model cannot tell neighbours apart, so measuring only its favourites would measure one kernel many times.
    """
    backend = backend_of(spec)
    ranked = list(backend.schedules(spec, target, m))
    kept: list[Schedule] = []
    for features in CUDA_FEATURES if backend.name == "cuda" else TRITON_FEATURES:
        seen = set()
        for s in ranked:
            values = s.to_dict()
            kind = (s.tile_m, s.tile_n, *(values.get(f, 0) for f in features))
            if kind not in seen and len(kept) < count:
                seen.add(kind)
                kept += [s] if s not in kept else []
    return kept


def neighbours(spec: KernelSpec, target: Target, best: Schedule) -> list[Schedule]:
    """Legal schedules one step from `best`: half or twice its split, depth, stages or warps."""
    found = []
    for name in ("split_k", "tile_k", "warps", "stages"):
        value = getattr(best, name)
        for other in (value - 1, value + 1) if name == "stages" else (value // 2, value * 2):
            s = replace(best, **{name: other})
            if other >= 1 and s.warps <= 16 and illegal(spec, s, target) is None:
                found.append(s)
    return found


def _build(spec: KernelSpec, schedule: Schedule, arch: str, path: str) -> str:
    """In a worker process: generate, compile into Triton's cache; returns an error or an empty text."""
    try:
        target, backend = Target.parse(arch), backend_of(spec)
        backend.compile(backend.emit(spec, schedule, target), Path(path))
        if backend.name == "triton":  # which compiles when a kernel is loaded, into its cache
            backend.load(Path(path), spec, schedule)
    except Exception as e:  # a schedule that does not compile is a result
        return f"{type(e).__name__}: {e}"[:500]
    return ""


class Builder:
    """Compiles schedules in several processes, and loads them here from Triton's cache."""

    def __init__(self, target: Target, folder: Path) -> None:
        self.target = target
        self.folder = folder
        workers = max(1, min(12, (os.cpu_count() or 2) - 2))
        self.pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))

    def build(self, spec: KernelSpec, schedules: Iterable[Schedule]) -> tuple[dict[Schedule, Launcher], dict[str, str]]:
        """Launchers, and error texts by schedule."""
        jobs = {}
        for s in dict.fromkeys(schedules):
            name = f"{spec.digest()}-{abs(hash(s)):x}{'.cubin' if backend_of(spec).name == 'cuda' else '.py'}"
            jobs[self.pool.submit(_build, spec, s, str(self.target), str(self.folder / name))] = (s, self.folder / name)
        loaded, failed = {}, {}
        for job in as_completed(jobs):
            s, path = jobs[job]
            if error := job.result():
                failed[_text(s)] = error
            else:
                loaded[s] = backend_of(spec).load(path, spec, s)
        return loaded, failed


def _text(schedule: Schedule) -> str:
    return " ".join(f"{k}={v}" for k, v in schedule.to_dict().items())


def _measure(launch: Launcher, copies: list[PackedWeight], x: torch.Tensor, want: torch.Tensor) -> dict[str, Any]:
    """Error, and time when the error is small. The output is poisoned first."""
    out = torch.full_like(want, float("nan"), dtype=torch.bfloat16)
    launch(x, copies[0], None, None, out)
    error = relative_error(out, want)
    if not error <= ERROR_LIMIT:
        return {"error": error, "wrong": True}
    seconds = seconds_per_call([lambda w=w: launch(x, w, None, None, out) for w in copies])
    return {"error": error, "seconds": seconds}


def _row(problem: Problem, m: int, seconds: float) -> dict[str, Any]:
    return {
        "m": m,
        "seconds": seconds,
        "bytes_per_s": (problem.nbytes + 2 * m * (problem.n + problem.k)) / seconds,
        "flops_per_s": 2 * m * problem.n * problem.k / seconds,
    }


class Tuner:
    """Measures schedules of one matrix; the oracle and the weight copies are made once."""

    def __init__(self, run: Run, builder: Builder, problem: Problem) -> None:
        self.run, self.builder, self.problem = run, builder, problem
        self.copies = copies_of(random_weight(problem), problem.nbytes)
        self.dense = dequantize(self.copies[0])
        self.failed: dict[str, str] = {}
        self.wrong: list[dict[str, Any]] = []
        self.tried: dict[int, dict[Schedule, dict[str, Any]]] = {}

    def measure(self, lists: dict[int, Sequence[Schedule]]) -> None:
        """Build what is new in `lists` (token count -> schedules) in one go, then check and time it."""
        spec = self.problem.spec
        new = {m: [s for s in choices if s not in self.tried.get(m, {})] for m, choices in lists.items()}
        loaded, failed = self.builder.build(spec, [s for choices in new.values() for s in choices])
        self.failed |= failed
        for m, choices in new.items():
            self.run.need(5)
            x = torch.randn(m, self.problem.k, device=kernel_cases.DEVICE, dtype=torch.bfloat16)
            want = x.float() @ self.dense.T
            for s in choices:
                if s in loaded:
                    self._keep(m, s, _measure(loaded[s], self.copies, x, want))

    def _keep(self, m: int, schedule: Schedule, got: dict[str, Any]) -> None:
        if "seconds" in got:
            self.tried.setdefault(m, {})[schedule] = got
        else:
            self.wrong.append({"m": m, "schedule": schedule.to_dict(), **got})

    def best(self, m: int) -> Schedule | None:
        """The fastest right schedule so far."""
        return min(self.tried.get(m, {}), key=lambda s: self.tried[m][s]["seconds"], default=None)

    def result(self) -> dict[str, Any]:
        """Everything measured, the best of each token count first."""
        spec, target, rows = self.problem.spec, self.builder.target, []
        for m, tried in self.tried.items():
            ranked = sorted(tried, key=lambda s: tried[s]["seconds"])
            entries = [
                {**tried[s], "schedule": s.to_dict(), "predicted": backend_of(spec).predict(spec, s, target, m)}
                for s in ranked
            ]
            rows.append({**_row(self.problem, m, entries[0]["seconds"]), **entries[0], "others": entries[1:]})
        return {"spec": spec.key(), "rows": rows, "failed": self.failed, "wrong": self.wrong}


def tune_problem(
    run: Run, builder: Builder, problem: Problem, tokens: Iterable[int], count: int, rounds: int
) -> dict[str, Any]:
    """The best schedules of one matrix: the shortlist, then `rounds` times the neighbours of the best."""
    tuner = Tuner(run, builder, problem)
    tuner.measure({m: shortlist(problem.spec, builder.target, m, count) for m in tokens})
    for _ in range(rounds):
        found = {m: best for m in tokens if (best := tuner.best(m)) is not None}
        tuner.measure({m: neighbours(problem.spec, builder.target, best) for m, best in found.items()})
    return tuner.result()


def check(run: Run) -> dict[str, Any]:
    """A quick look at one large matrix in every format: right or wrong, and how fast."""
    with tempfile.TemporaryDirectory() as folder:
        builder = Builder(_device_target(), Path(folder))
        chosen = {p.fmt: p for p in reversed(run.problems())}.values()  # the first matrix of every format
        found = {str(p): tune_problem(run, builder, p, (1, 16, 1024), 4, 0) for p in chosen}
    return {"problems": found, "wrong": sum(len(f["wrong"]) for f in found.values())}


def tune(run: Run) -> dict[str, Any]:
    """All of the grid; the file is the tuned database."""
    result = {"problems": {}, **run.read("tune")}
    with tempfile.TemporaryDirectory() as folder:
        builder = Builder(_device_target(), Path(folder))
        for problem in run.problems():
            if str(problem) not in result["problems"]:
                run.need(25)
                result["problems"][str(problem)] = tune_problem(run, builder, problem, TOKENS, SHORTLIST, 1)
                run.write("tune", result)
                _print_best(problem, result["problems"][str(problem)])
    return result


def _print_best(problem: Problem, result: dict[str, Any]) -> None:
    cells = " ".join(f"m{r['m']}={r['seconds'] * 1e6:.1f}us" for r in result["rows"])
    print(f"{problem}: {cells} ({len(result['failed'])} failed, {len(result['wrong'])} wrong)", flush=True)


def compare(run: Run) -> dict[str, Any]:
    """Peers on the same matrices and token counts, beside the tuned times."""
    result = {"problems": {}, **run.read("compare")}
    tuned = run.read("tune").get("problems", {})
    for problem in run.problems():
        if str(problem) in result["problems"] or str(problem) not in tuned:
            continue
        run.need(20)
        dense = dequantize(random_weight(problem))
        entry: dict[str, Any] = {"lowbit": tuned[str(problem)]["rows"], "skipped": {}}
        for name in PEERS:
            rows, why = _time_peer(run, name, problem, dense)
            entry[name] = rows
            if why:
                entry["skipped"][name] = why
        result["problems"][str(problem)] = entry
        run.write("compare", result)
    return result


def _time_peer(run: Run, name: str, problem: Problem, dense: torch.Tensor) -> tuple[list[dict[str, Any]], str]:
    nbytes = 2 * dense.numel() if name == "torch-bf16" else problem.nbytes
    products = []
    for _ in range(max(2, -(-(256 << 20) // nbytes))):
        product, why = prepare(name, problem, dense)
        if product is None:
            return [], why
        products.append(product)
    rows = []
    for m in TOKENS:
        run.need(5)
        x = torch.randn(m, problem.k, device=kernel_cases.DEVICE, dtype=torch.bfloat16)
        try:
            error = relative_error(products[0](x), x.float() @ dense.T)
            seconds = seconds_per_call([lambda p=p, x=x: p(x) for p in products])
        except Exception as e:  # a peer's failure is a finding
            return rows, f"m={m}: {type(e).__name__}: {e}"[:300]
        rows.append({**_row(problem, m, seconds), "error": error})
    return rows, ""


def _device_target() -> Target:
    major, minor = torch.cuda.get_device_capability()
    return Target("cuda", f"sm_{major}{minor}")


def dry_run(run: Run, arch: str) -> dict[str, Any]:
    """Without a GPU: enumerate grid and schedules, and compile the best kernels of two token counts offline."""
    target = Target.parse(arch)
    listed = {p.fmt: p for p in reversed(run.problems())}.values()  # one matrix of every format
    grid = {str(p): {str(m): [s.to_dict() for s in shortlist(p.spec, target, m)] for m in TOKENS} for p in listed}
    result: dict[str, Any] = {"arch": arch, "problems": [str(p) for p in run.problems()], "tokens": list(TOKENS)}
    result |= {"schedules": grid, "offline": []}
    if find_spec("triton") is None:
        return {**result, "skipped": "triton is not installed"}
    first = run.problems()[0]
    best = {m: shortlist(first.spec, target, m, 1)[0] for m in (1, 64)}
    for (m, s), report in zip(best.items(), _offline(first.spec, list(best.values()), target), strict=True):
        facts = {"registers": report.registers, "spills": report.spills, "shared_bytes": report.shared_bytes}
        result["offline"].append({"problem": str(first), "m": m, "schedule": s.to_dict(), **facts})
    return result


def _offline(spec: KernelSpec, schedules: list[Schedule], target: Target) -> list[Any]:
    if backend_of(spec).name == "cuda":
        from lowbit.codegen.cuda.offline import inspect

        return list(inspect([(spec, s, target) for s in schedules]))
    from lowbit.codegen.triton.offline import compile_offline

    sources = [(backend_of(spec).emit(spec, s, target), str(target)) for s in schedules]
    return [reports[0] for reports in compile_offline(sources)]


def run_stage(run: Run, stage: str, function: Callable[[Run], dict[str, Any]]) -> bool:
    """Run one stage unless it is complete; False when time ran out."""
    if run.read(stage)["complete"]:
        print(f"{stage}: already there", flush=True)
        return True
    began = time.monotonic()
    try:
        run.need(10)
        result = function(run)
    except OutOfTime:
        print(f"{stage}: out of time, the next run goes on here", flush=True)
        return False
    run.write(stage, {"stage": stage, **result, "complete": True})
    print(f"{stage}: done in {time.monotonic() - began:.0f} s", flush=True)
    return True


def main() -> int:
    """The command line; returns 0 when everything asked for is complete, 3 when time ran out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=STAGES, action="append", help="may be repeated; default: all")
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("LOWBIT_GPU_SECONDS", "540")))
    parser.add_argument("--format", action="append", default=[], help="may be repeated; default: all of the grid's")
    parser.add_argument("--backend", choices=("cuda", "triton"), default="triton")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--arch", default="sm_90")
    args = parser.parse_args()
    run = Run(args.out, args.seconds, args.format, args.backend)
    if args.dry_run:
        return 0 if run_stage(run, "dry-run", lambda r: dry_run(r, args.arch)) else 3
    if not torch.cuda.is_available():
        print("no CUDA device; --dry-run needs none", file=sys.stderr)
        return 2
    stages = {"environment": environment, "check": check, "tune": tune, "compare": compare}
    done = [run_stage(run, name, stages[name]) for name in STAGES if name in (args.stage or STAGES)]
    return 0 if all(done) else 3


if __name__ == "__main__":
    sys.exit(main())
