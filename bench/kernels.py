"""GPU kernels: check, tune, compare with peers. One resumable run, in stages; see `gpu.sh`.

    python bench/kernels.py --out DIR [--backend cuda] [--stage STAGE] [--seconds S]
    python bench/kernels.py --dry-run [--arch sm_90]        # no GPU: the grid, and a few kernels compiled offline

Every stage writes `DIR/<stage>.json` and is skipped when that file says it is complete. `tune` is lowbit's own tuner:
its database in `DIR/tuning` keeps what was measured, and `DIR/tuning/shipped` what `codegen/tune/data` may take.
`compare` saves after every matrix, and measures a matrix again when more of it was tuned. Both go on where they
stopped; where both are asked for, tuning leaves comparing a part of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kernel_cases
import torch
from kernel_cases import TOKENS, Problem, dequantize, problems, random_weight, relative_error, seconds_per_call
from kernel_peers import PEERS, prepare

from lowbit.codegen import load_backend
from lowbit.codegen.backend import Backend
from lowbit.codegen.schedule import M_CLASSES, Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.tune.device import device_name, file_name
from lowbit.codegen.tune.measure import copies_of
from lowbit.codegen.tune.space import candidates_of, legal_schedules, shortlist
from lowbit.codegen.tune.tuner import Job, Options, Outcome, tune_kernels
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target
from lowbit.compiler.job.kernel_tuning import export
from lowbit.compiler.runtime.build import adopt_kernel, build_kernel
from lowbit.compiler.runtime.cache import KernelCache
from lowbit.quantizers.qtensor import PackedWeight

STAGES = ("environment", "check", "tune", "compare")
SHORTLIST = 12  # schedules measured for each (matrix, tokens)
TELLING = (1, 16, 512)
SHARE = 0.6  # of the time left, for tuning where comparing follows


class OutOfTime(Exception):
    """The run's time is used up; the next run goes on from here."""


class Run:
    """A folder of results and a deadline."""

    def __init__(
        self,
        out: Path,
        seconds: float,
        formats: Sequence[str] = (),
        backend: str = "triton",
        tuning: Path | None = None,
        share: float = 1.0,
    ) -> None:
        self.out, self.tuning, self.share = out, tuning or out / "tuning", share
        self.formats = formats
        self.backend = backend
        self.deadline = time.monotonic() + seconds
        out.mkdir(parents=True, exist_ok=True)

    def problems(self) -> list[Problem]:
        """The grid, or its part in the formats asked for."""
        grid = problems() if self.backend == "triton" else problems(self.backend)
        return [p for p in grid if not self.formats or p.fmt in self.formats]

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def need(self, seconds: float) -> None:
        """Raise OutOfTime when less than `seconds` are left."""
        if self.left() < seconds:
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


def backend_of(spec: KernelSpec) -> Backend:
    """The backend whose layout the weights are in."""
    return load_backend("cuda" if spec.layout_ == LAYOUTS["fragments"] else "triton")


def ranked(spec: KernelSpec, target: Target, m: int, count: int = SHORTLIST) -> list[Schedule]:
    """The schedules that tuning would measure first."""
    backend = backend_of(spec)
    return shortlist(backend, legal_schedules(candidates_of(backend, spec, target, m)), count)


def _row(problem: Problem, m: int, seconds: float) -> dict[str, Any]:
    return {
        "m": m,
        "seconds": seconds,
        "bytes_per_s": (problem.nbytes + 2 * m * (problem.n + problem.k)) / seconds,
        "flops_per_s": 2 * m * problem.n * problem.k / seconds,
    }


def _tuned(run: Run, problems: Sequence[Problem], tokens: Sequence[int], options: Options) -> dict[str, Any]:
    """What the tuner finds, by matrix; every kernel is printed as it is settled. The database keeps everything."""
    target, found = _device_target(), {str(p): {"spec": p.spec.key(), "rows": [], "left_out": []} for p in problems}
    names = [(p, m) for m_pass in _passes(tokens) for p in problems for m in m_pass]

    def settled(i: int, n: int, outcome: Outcome) -> None:
        problem, m = names[i - 1]
        entry, result = outcome.entry, found[str(problem)]
        result["left_out"] += [{"m": m, "why": line} for line in outcome.failures]
        if entry is not None:
            values = {"backend": entry.backend, "schedule": entry.schedule.to_dict(), "error": entry.error}
            times = {"default_seconds": entry.default_seconds, "complete": entry.complete}
            result["rows"].append({**_row(problem, m, entry.seconds), **values, **times})
        text = f"{entry.seconds * 1e6:.1f} us by {entry.backend}" if entry else outcome.why
        print(f"{i}/{n} {problem} m{m}: {text}", flush=True)

    torch.cuda.empty_cache()
    jobs = [Job(p.spec, m) for p, m in names]
    outcomes = tune_kernels(
        jobs, target, options, settled, lambda b, s, c, path, e: adopt_kernel(b, s, c, target, path, e)
    )
    left = sum(o.entry is None or not o.entry.complete for o in outcomes)
    return {"problems": found, "left": left, "wrong": sum(": wrong: " in line for o in outcomes for line in o.failures)}


def _passes(tokens: Sequence[int]) -> list[list[int]]:
    """The token counts that tell most for every matrix first."""
    first = [m for m in tokens if m in TELLING]
    return [first, [m for m in tokens if m not in TELLING]]


def check(run: Run) -> dict[str, Any]:
    """A quick look at one large matrix in every format: right or wrong, and how fast."""
    chosen = list({p.fmt: p for p in reversed(run.problems())}.values())  # the first matrix of every format
    options = Options(budget=min(run.left() - 5, 120), candidates=3, neighbours=0, finalists=2)
    with _databases(run.out / "check"):
        found = _tuned(run, chosen, TELLING, options)
    return found


def tune(run: Run) -> dict[str, Any]:
    """All of the grid. The database lies in the run's tuning folder; `shipped` beside it has what can be committed."""
    with _databases(run.tuning):
        found = _tuned(run, run.problems(), M_CLASSES, Options(budget=run.left() * run.share - 5, candidates=SHORTLIST))
        device = str(device_name(_device_target()))
        found["shipped"] = export(_device_target(), run.tuning / "shipped" / file_name(device))
    if found["left"]:
        run.write("tune", {"stage": "tune", **found, "complete": False})
        raise OutOfTime
    return found


@contextmanager
def _databases(folder: Path) -> Iterator[None]:
    """Tuning databases are those of `folder`."""
    before = os.environ.get("LOWBIT_TUNING")
    os.environ["LOWBIT_TUNING"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("LOWBIT_TUNING")
        if before is not None:
            os.environ["LOWBIT_TUNING"] = before


def compare(run: Run) -> dict[str, Any]:
    """Ours as selection gives it, and peers, on the same matrices and token counts, in one run."""
    result = {"problems": {}, **run.read("compare")}
    tuned = run.read("tune").get("problems", {})
    for problem in run.problems():
        rows = len(tuned.get(str(problem), {}).get("rows", ()))
        if not rows or result["problems"].get(str(problem), {}).get("tuned_rows") == rows:
            continue
        run.need(20)
        weight = random_weight(problem)
        dense = dequantize(weight)
        with _databases(run.tuning):
            ours = _time_ours(run, problem, weight, dense)
        entry: dict[str, Any] = {"lowbit": ours, "skipped": {}, "tuned_rows": rows}
        for name in PEERS:
            rows, why = _time_peer(run, name, problem, dense)
            entry[name] = rows
            if why:
                entry["skipped"][name] = why
        result["problems"][str(problem)] = entry
        run.write("compare", result)
    if not run.read("tune")["complete"]:
        raise OutOfTime
    return result


def _time_ours(run: Run, problem: Problem, weight: PackedWeight, dense: torch.Tensor) -> list[dict[str, Any]]:
    """The kernel that serving would use, for every token count."""
    spec, target, rows = problem.spec, _device_target(), []
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # compilers are slow, and most of these are not tuned ones
        kernels = list(pool.map(lambda m: build_kernel(spec, target, m, KernelCache()), TOKENS))
    copies = copies_of(weight, kernel_cases.COLD_BYTES)
    for m, kernel in zip(TOKENS, kernels, strict=True):
        run.need(5)
        x = torch.randn(m, problem.k, device=kernel_cases.DEVICE, dtype=torch.bfloat16)
        out = torch.full((m, problem.n), float("nan"), device=kernel_cases.DEVICE, dtype=torch.bfloat16)
        kernel.launch(x, copies[0], None, None, out)
        error = relative_error(out, x.float() @ dense.T)
        calls = [lambda w=w, x=x, out=out: kernel.launch(x, w, None, None, out) for w in copies]  # noqa: B023
        facts = {"error": error, "backend": kernel.backend, "schedule": kernel.schedule.to_dict()}
        rows.append({**_row(problem, m, seconds_per_call(calls)), **facts})
    return rows


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
    grid = {str(p): {str(m): [s.to_dict() for s in ranked(p.spec, target, m)] for m in TOKENS} for p in listed}
    result: dict[str, Any] = {"arch": arch, "problems": [str(p) for p in run.problems()], "tokens": list(TOKENS)}
    result |= {"schedules": grid, "offline": []}
    if find_spec("triton") is None:
        return {**result, "skipped": "triton is not installed"}
    first = run.problems()[0]
    best = {m: ranked(first.spec, target, m, 1)[0] for m in (1, 64)}
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
    parser.add_argument("--tuning", type=Path, help="folder of the tuning database; default: OUT/tuning")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--arch", default="sm_90")
    args = parser.parse_args()
    asked = args.stage or STAGES
    share = SHARE if {"tune", "compare"} <= set(asked) else 1.0
    run = Run(args.out, args.seconds, args.format, args.backend, args.tuning, share)
    if args.dry_run:
        return 0 if run_stage(run, "dry-run", lambda r: dry_run(r, args.arch)) else 3
    if not torch.cuda.is_available():
        print("no CUDA device; --dry-run needs none", file=sys.stderr)
        return 2
    stages = {"environment": environment, "check": check, "tune": tune, "compare": compare}
    done = [run_stage(run, name, stages[name]) for name in STAGES if name in asked]
    return 0 if all(done) else 3


if __name__ == "__main__":
    sys.exit(main())
