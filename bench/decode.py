"""Tokens a second of a small language model, one sequence: transformers, torch.compile, lowbit and llama.cpp in turns.

    python bench/decode.py MODEL.gguf --json bench/results/decode.json
    python bench/decode.py MODEL --arms program,modules,llama.cpp --threads 1 --llama-python PATH/TO/python
    python bench/decode.py MODEL.gguf --format int8.ch.sym,int4.g64.sym,int2.g64.asym --llama-kind Q8_0,Q4_0,Q2_K
    python bench/decode.py MODEL.gguf --arms program-head8,llama.cpp --format file --llama-kind file

Arms: `hf-fp32` and `hf-bf16`, transformers as it is; `inductor-bf16`, torch.compile, StaticCache, static shapes;
`modules`, lowbit.compile; `backend`, torch.compile(backend="lowbit") likewise; `program`, the native program;
`backend-head8` and `program-head8` with an output layer of 8 bits; `llama.cpp`. With several formats or kinds there is
an arm for each; `modules:int4.g64.sym` asks for one only. A format may name activations' behind it, as in
`int4.g64.sym+int8.token`; without one they have 16 bits. llama.cpp rounds them to 8.

The format and kind `file` are the GGUF file as it is: the same codes and scales in lowbit's kernels and in llama.cpp's.
Otherwise llama.cpp requantizes the file. Its K kinds and TQ2_0 need rows of a multiple of 256; where a model has others
(576 in SmolLM2-135M) it takes another type for those tensors, without failing. What a file then really holds is printed
and recorded with its bits per weight, and a kind that no tensor has is not measured.

Arms take turns, so that what else the machine does meets all of them alike. A figure is the median of rounds; `cpu` is
tokens per second of processor time, which other processes disturb less (one thread only). llama.cpp runs in a process
of its own, through llama-cpp-python, and is left out with a message where that cannot be imported.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import lowbit
from lowbit.compiler.job.models import find_model
from lowbit.quantizers.formats import parse_activation, parse_format
from lowbit.quantizers.scheme import Scheme

BACKENDS = ("backend", "backend-head8")
ARMS = ("hf-fp32", "hf-bf16", "inductor-bf16", "modules", *BACKENDS, "program", "program-head8", "llama.cpp")
DEFAULT = "hf-bf16,inductor-bf16,modules,backend,program,program-head8,llama.cpp"
PREFILL = 512
FILE = "file"

LLAMA = """
import json, os, sys, time
path, kind, out, threads, prompt, tokens = *sys.argv[1:4], *map(int, sys.argv[4:7])
import llama_cpp
if kind:
    p = llama_cpp.llama_model_quantize_default_params()
    p.ftype, p.allow_requantize = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), True
    if llama_cpp.llama_model_quantize(path.encode(), (out + ".part").encode(), p):
        sys.exit(f"llama.cpp does not quantize this model to {kind}")
    os.replace(out + ".part", out)
if not tokens:
    sys.exit()
m = llama_cpp.Llama(path, n_ctx=1024, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
ids = [(7 * i) % 1000 + 100 for i in range(prompt)]
m.eval(ids)
start, cpu = time.perf_counter(), time.process_time()
token = ids[-1]
for _ in range(tokens):
    m.eval([token])
wall, cpu = time.perf_counter() - start, time.process_time() - cpu
m.reset()
begin = time.perf_counter()
m.eval([(7 * i) % 1000 + 100 for i in range(512)])
prefill = time.perf_counter() - begin
print(json.dumps({"decode": tokens / wall, "cpu": tokens / cpu, "prefill": 512 / prefill}))
"""

Arm = Callable[[torch.Tensor, int], None]
"""arm(prompt [T], tokens): runs a prompt, then so many single tokens."""


def main() -> int:
    args = _arguments()
    torch.set_num_threads(max(args.counts))
    names = _names(args)
    peers = {name: _peer_file(name.partition(":")[2], args) for name in names if name.startswith("llama.cpp")}
    names = [name for name in names if peers.get(name, True)]
    arms = _build(args, [n for n in names if n not in peers])
    for count in args.counts:
        args.threads = count
        torch.set_num_threads(count)
        _compare(args, names, arms, peers)
    return 0


def _compare(args: argparse.Namespace, names: list[str], arms: dict[str, Any], peers: dict[str, Peer | None]) -> None:
    """All arms in turns, with `args.threads` threads: prints and records what they take."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            peer = peers.get(name)
            found = _llama(peer, args) if peer else _measure(arms[name], args)
            if found:
                runs[name].append(found)
    results: dict[str, dict[str, Any]] = {
        n: {k: round(statistics.median(r[k] for r in rs), 1) for k in rs[0]} for n, rs in runs.items() if rs
    }
    programs = [arms[name] for name in arms if name.startswith("_program")]
    parts = _profile(programs[-1]) if programs else {}
    print(f"{f'arm, {args.threads} threads':30} {'decode tok/s':>14} {'per cpu second':>15} {'prefill 512':>12}")
    for name, r in results.items():
        print(f"{name:30} {r['decode']:14.1f} {r['cpu']:15.1f} {r['prefill']:12.1f}")
        if peer := peers.get(name):
            r["file"] = peer.contents
    for part, ms in parts.items():
        print(f"  {part:16} {ms:8.3f} ms")
    if args.json:
        record = {
            "machine": platform.processor() or platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg(),
            "torch": torch.__version__, "lowbit": lowbit.__version__, "threads": args.threads, "format": args.format,
            "prompt": args.prompt, "tokens": args.tokens, "rounds": args.rounds, "results": results, "parts_ms": parts,
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        old = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps({**old, f"threads={args.threads}": record}, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    p.add_argument("model", help="a GGUF file, folder or hub id")
    p.add_argument("--arms", default=DEFAULT, help=f"from {', '.join(ARMS)}")
    p.add_argument(
        "--format", default="int4.g64.sym", help="weights of the lowbit arms, rounded to nearest, or `file`; or several"
    )
    p.add_argument("--threads", default="1", help="or several, such as 1,2, with the same programs")
    p.add_argument("--prompt", type=int, default=16)
    p.add_argument("--tokens", type=int, default=128, help="decoded; at most 239 behind a prompt of 16")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--llama-python", default=sys.executable, help="a Python that can import llama_cpp")
    p.add_argument("--llama-kind", default="Q4_0", help="requantize the file so for llama.cpp, or `file`; or several")
    p.add_argument("--json", type=Path)
    args = p.parse_args()
    args.counts = [int(n) for n in args.threads.split(",")]
    return args


def _names(args: argparse.Namespace) -> list[str]:
    """Arms; those that several formats or kinds were asked for once for each, with that behind a colon.

    An arm that was given with a colon is one with the format or kind behind it.
    """
    found: list[str] = []
    for name in args.arms.split(","):
        if ":" in name:
            found.append(name)
            continue
        given = args.llama_kind.split(",") if name == "llama.cpp" else args.format.split(",")
        plain = name in ("hf-fp32", "hf-bf16", "inductor-bf16") or (len(given) == 1 and name != "llama.cpp")
        found += [name] if plain else [f"{name}:{text}" for text in given]
    return found


def _build(args: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """Every arm, warmed up."""
    dense = find_model(args.model).load()
    torch._dynamo.config.recompile_limit = 64  # all compiled arms are graphs of the same code, three of each
    arms: dict[str, Any] = {}
    made: dict[str, nn.Module] = {}
    for full in names:
        print(f"building {full}", file=sys.stderr, flush=True)
        name, _, text = full.partition(":")
        text = text or args.format
        if name not in ("hf-fp32", "hf-bf16", "inductor-bf16") and text not in made:
            made[text] = lowbit.load(args.model) if text == FILE else _rounded(dense, text)
        quantized = made.get(text)
        if name.startswith("program"):
            head = "int8.ch.sym" if name.endswith("head8") else None
            model = lowbit.compile(copy.deepcopy(quantized), max_tokens=512, mode="program", context=1024, head=head)
            arms[full], arms[f"_{full}"] = _program_arm(model.lowbit_program), model.lowbit_program  # type: ignore[union-attr]
            continue
        model = copy.deepcopy(quantized if name in ("modules", *BACKENDS) else dense)
        assert model is not None
        if name == "backend-head8":
            lowbit.quantize_head(model, "int8.ch.sym")
        if name.endswith("bf16"):
            model = model.to(torch.bfloat16)
        if name == "modules":
            model = lowbit.compile(model, max_tokens=512)
        if name in ("inductor-bf16", *BACKENDS):
            compiler = "lowbit" if name in BACKENDS else "inductor"
            arms[full] = _static_arm(model, torch.compile(model, dynamic=False, backend=compiler))
        else:
            arms[full] = _growing_arm(model)
    for name in names:
        arms[name](torch.arange(100, 100 + args.prompt), 4)
        arms[name](torch.arange(100, 100 + PREFILL), 0)
    return arms


def _rounded(dense: nn.Module, text: str) -> nn.Module:
    weight, _, activation = text.partition("+")
    rounded = parse_activation(activation) if activation else None
    scheme = Scheme("bench", parse_format(weight), "rtn", {"clip_search": False}, activation=rounded)
    return lowbit.quantize(copy.deepcopy(dense), scheme)


def _steps(runs: Any, cache: Any, prompt: torch.Tensor, tokens: int) -> None:
    step = prompt[None]
    with torch.no_grad():
        for _ in range(tokens + 1):
            logits = runs(step, past_key_values=cache, logits_to_keep=1).logits
            step = logits[:, -1:].argmax(-1)


def _growing_arm(model: nn.Module) -> Arm:
    from transformers import DynamicCache

    return lambda prompt, tokens: _steps(model, DynamicCache(config=model.config), prompt, tokens)


def _static_arm(model: nn.Module, runs: Any) -> Arm:
    """One cache for decoding, one for the long prompt, allocated (and graphs compiled) in the warm-up."""
    from transformers import StaticCache

    caches: dict[bool, Any] = {}

    def arm(prompt: torch.Tensor, tokens: int) -> None:
        long = prompt.numel() == PREFILL
        if long not in caches:
            caches[long] = StaticCache(config=model.config, max_cache_len=PREFILL if long else 256)
            _steps(model, caches[long], prompt[:1], 0)  # allocates, outside the compiled graph
        caches[long].reset()
        _steps(runs, caches[long], prompt, tokens)

    return arm


def _program_arm(program: Any) -> Arm:
    def arm(prompt: torch.Tensor, tokens: int) -> None:
        cache, step = program.new_cache(prompt.numel() + tokens), prompt
        for _ in range(tokens + 1):
            step = program.run(step, cache)[-1:].argmax(-1)

    return arm


def _measure(arm: Arm, args: argparse.Namespace) -> dict[str, float]:
    """Decoding is a run with tokens less one without."""
    prompt = torch.arange(100, 100 + args.prompt)
    walls, cpus = [], []
    for tokens in (0, args.tokens):
        wall, cpu = time.perf_counter(), time.process_time()
        arm(prompt, tokens)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    start = time.perf_counter()
    arm(torch.arange(100, 100 + PREFILL), 0)
    prefill = PREFILL / (time.perf_counter() - start)
    return {
        "decode": args.tokens / (walls[1] - walls[0]),
        "cpu": args.tokens / (cpus[1] - cpus[0]),
        "prefill": prefill,
    }


class Peer(NamedTuple):
    """A file for llama.cpp: its path, and what it holds: bits per weight, and the share of weights by type."""

    path: str
    contents: dict[str, Any]


def _peer_file(kind: str, args: argparse.Namespace) -> Peer | None:
    """The model requantized to `kind`, as it is when empty; made once, kept beside other temporary files."""
    given, kind = Path(args.model), "" if kind == FILE else kind
    if given.suffix != ".gguf":
        print("llama.cpp is left out: it needs a GGUF file", file=sys.stderr)
        return None
    mark = hashlib.sha256(f"{given.resolve()} {given.stat().st_size} {given.stat().st_mtime}".encode()).hexdigest()[:12]
    path = Path(tempfile.gettempdir()) / f"lowbit-bench-{mark}-{kind}.gguf" if kind else given
    if not path.exists() and _llama_process(str(given), kind, str(path), args, tokens=0) is None:
        return None
    contents = _contents(path)
    print(f"llama.cpp {kind or 'file'}: {contents}", file=sys.stderr)
    if kind and not any(kind.startswith(name) for name in contents["share"]):
        print(f"llama.cpp {kind} is left out: no tensor of this model can have that type", file=sys.stderr)
        return None
    return Peer(str(path), contents)


def _contents(path: Path) -> dict[str, Any]:
    """What a GGUF file's matrices are stored as."""
    import gguf

    counts: dict[str, int] = {}
    tensors = [t for t in gguf.GGUFReader(path).tensors if len(t.shape) > 1]
    for tensor in tensors:
        counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    total = sum(counts.values())
    bits = 8 * sum(int(t.n_bytes) for t in tensors) / total
    return {"bits_per_weight": round(bits, 2), "share": {n: round(c / total, 3) for n, c in counts.items()}}


def _llama(peer: Peer, args: argparse.Namespace) -> dict[str, float] | None:
    out = _llama_process(peer.path, "", "", args, tokens=args.tokens)
    found: dict[str, float] | None = json.loads(out.splitlines()[-1]) if out else None
    return found


def _llama_process(path: str, kind: str, out: str, args: argparse.Namespace, tokens: int) -> str | None:
    """What a process with llama.cpp prints; None, with a message, where it fails."""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:
        script.write(LLAMA)
        script.flush()
        command = [args.llama_python, script.name, path, kind, out]
        command += [str(n) for n in (args.threads if tokens else max(args.counts), args.prompt, tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        print(f"llama.cpp {kind} is left out: {why}", file=sys.stderr)
        return None
    return done.stdout


def _profile(program: Any) -> dict[str, float]:
    """Milliseconds by part of one token: the tenth percentile of each part over 100 steps."""
    cache = program.new_cache(256)
    program.run(torch.arange(100, 116), cache)
    steps = [program.profile(torch.tensor([100]), cache) for _ in range(100)]
    return {part: round(1e3 * sorted(s[part] for s in steps)[10], 3) for part in steps[0]}


if __name__ == "__main__":
    sys.exit(main())
