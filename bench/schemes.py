"""Perplexity of whole schemes: codes chosen by a method, then side values tuned by block, then fine-tuned end to end.

    python bench/schemes.py MODEL --test TEXT --calib TEXT --runs int2.g64.asym:gptq vq.d4.k256:vptq --tune 2

Every stage is measured on the same windows, with true bits per weight (codes, scales, codebooks, padding), minutes and
the process's peak memory. Statistics come from the float model, so methods are compared on equal terms; with --share
they are computed once for all runs (codes only), and each run's minutes are those of its own method.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lowbit.compiler.io.source import open_model
from lowbit.compiler.job.engine import known_entry
from lowbit.compiler.job.finetune import finetune
from lowbit.compiler.job.inmemory import Choice, choose
from lowbit.compiler.job.journal import load_qtensor, save_qtensors
from lowbit.compiler.job.layers import peak_rss, versions
from lowbit.compiler.job.workers import default_workers
from lowbit.quantizers.calibration import calibration_tokens
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.methods import make_method, quantize_weight
from lowbit.quantizers.scheme import Scheme, Tuning
from lowbit.quantizers.weights import QWeight

from quality import load, perplexity, statistics  # isort: skip  (a neighbour in this folder)


class Say:
    """Progress on standard output, a line a minute."""

    def __init__(self) -> None:
        self._last = 0.0

    def start(self, total_layers: int, names: Any) -> None:
        """Nothing."""

    def layer(self, i: int, n: int, path: str, info: Any) -> None:
        """At most one line a minute."""
        self.message(f"{i}/{n} {path} {info.get('proxy_error')}")

    def message(self, text: str) -> None:
        """At most one line a minute."""
        if time.monotonic() - self._last > 60:
            self._last = time.monotonic()
            print("   ", text, flush=True)

    def finish(self) -> None:
        """Nothing."""


@torch.no_grad()
def quality(model: nn.Module, weights: Mapping[str, QWeight], plain: Mapping[str, Tensor], windows: Tensor) -> float:
    """Perplexity with these weights and tensors in place; the model is restored afterwards."""
    state = dict(model.named_parameters())
    new = {**plain, **{f"{path}.weight": q.dequantize() for path, q in weights.items()}}
    kept = {name: state[name].detach().clone() for name in new}
    for name, value in new.items():
        state[name].data.copy_(value)
    found = perplexity(model, windows)
    for name, value in kept.items():
        state[name].data.copy_(value)
    return found


def bits(weights: Mapping[str, QWeight]) -> float:
    """Stored bits per quantized weight."""
    size = {path: q.shape[0] * q.shape[1] for path, q in weights.items()}
    return sum(q.bits_per_weight * size[path] for path, q in weights.items()) / sum(size.values())


def stages(
    model: nn.Module, run: str, tokens: Tensor, more: Tensor, args: argparse.Namespace
) -> Iterator[tuple[str, float, Choice]]:
    """(stage, seconds, result) one after the other; `more` are the tokens of fine-tuning."""
    fmt, method = run.split(":")
    scheme = Scheme("bench", parse_format(fmt), method, json.loads(args.options))
    kept = Path(args.keep) / f"{run.replace(':', '_')}.safetensors" if args.keep else None
    started = time.monotonic()
    before = kept.with_name(f"tuned_{kept.name}") if kept is not None else None
    if before is not None and before.exists() and args.finetune:  # only fine-tuning is left to do
        yield from _finetuned(model, kept_choice(before), more, args)
        return
    if kept is not None and kept.exists():
        result = kept_choice(kept)
        known = {path: q for path, (q, _) in result.layers.items()}
    else:
        mode = {"sequential": args.sequential, "workers": args.workers, "progress": Say()}
        result = choose(model, scheme, tokens, **mode)
        known = {path: q for path, (q, _) in result.layers.items()}
        if kept is not None:
            save_qtensors(kept, known)
    yield "codes", time.monotonic() - started, result
    if args.tune:
        started = time.monotonic()
        tuned = Scheme("bench", scheme.weight, method, {}, tune=Tuning(args.tune, args.tune_rate, args.batch))
        result = choose(model, tuned, tokens, sequential=False, known=known, progress=Say())
        if before is not None:
            plain = {name: value.clone() for name, value in result.plain.items()}
            save_qtensors(before, {p: q for p, (q, _) in result.layers.items()}, plain)
        yield "tuned", time.monotonic() - started, result
    if args.finetune:
        yield from _finetuned(model, result, more, args)


def shared(
    model: nn.Module, runs: Sequence[str], tokens: Tensor, args: argparse.Namespace
) -> Iterator[tuple[str, str, float, Choice]]:
    """(run, stage, seconds, result): the codes of all runs from one pass over the calibration tokens."""
    plans = {run: (parse_format(run.split(":")[0]), make_method(run.split(":")[1], {})) for run in runs}
    chosen: dict[str, dict[str, QWeight]] = {run: {} for run in runs}
    seconds = dict.fromkeys(runs, 0.0)
    for number, block in enumerate(statistics(model, tokens, [tokens.shape[0]])):
        for path, by_size in block.items():
            weight = model.get_submodule(path).weight
            assert isinstance(weight, Tensor)
            for run, (fmt, method) in plans.items():
                started = time.monotonic()
                found = quantize_weight(method, weight.detach(), fmt, by_size[tokens.shape[0]])
                seconds[run] += time.monotonic() - started
                chosen[run][path] = found.qtensor
        print(f"block {number} done", flush=True)
    if args.keep:
        for run, weights in chosen.items():
            save_qtensors(Path(args.keep) / f"{run.replace(':', '_')}.safetensors", weights)
    for run, weights in chosen.items():
        layers = {path: (q, known_entry(path, q)) for path, q in weights.items()}
        yield run, "codes", seconds[run], Choice(layers)


def kept_choice(file: Path) -> Choice:
    """What an earlier call kept."""
    with safe_open(file, framework="pt") as f:
        paths = list(f.metadata())
        plain = {name.removeprefix("plain."): f.get_tensor(name) for name in f.keys() if name.startswith("plain.")}
    layers = {path: load_qtensor(file, path) for path in paths}
    return Choice({path: (q, known_entry(path, q)) for path, q in layers.items()}, plain)


def _finetuned(
    model: nn.Module, start: Choice, more: Tensor, args: argparse.Namespace
) -> Iterator[tuple[str, float, Choice]]:
    started = time.monotonic()
    weights = {path: q for path, (q, _) in start.layers.items()}
    settings = Tuning(args.finetune, args.finetune_rate, args.finetune_batch)
    trained = finetune(model.requires_grad_(False), weights, start.plain, more, settings, Say().message)
    print("    divergence", trained.before, "->", trained.after, flush=True)
    final = {path: (q, known_entry(path, q)) for path, q in trained.weights.items()}
    yield "fine-tuned", time.monotonic() - started, Choice(final, dict(trained.plain))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder, GGUF file or hub id")
    parser.add_argument("--test", required=True, help="text to measure perplexity on")
    parser.add_argument("--calib", required=True, help="calibration text")
    parser.add_argument("--runs", nargs="+", required=True, help="format:method")
    parser.add_argument("--options", default="{}", help="method options as JSON")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--calib-length", type=int, default=512)
    parser.add_argument("--sequential", action="store_true", help="statistics behind the quantized layers")
    parser.add_argument("--tune", type=int, default=0, help="passes of block tuning")
    parser.add_argument("--tune-rate", type=float, default=4e-3)
    parser.add_argument("--finetune", type=int, default=0, help="passes of end-to-end fine-tuning")
    parser.add_argument("--finetune-rate", type=float, default=1e-3)
    parser.add_argument("--finetune-batch", type=int, default=2)
    parser.add_argument("--finetune-samples", type=int, default=0, help="other samples than the codes were chosen on")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--share", action="store_true", help="one pass of calibration for all runs; codes only")
    parser.add_argument("--keep", help="folder in which codes are kept between calls")
    parser.add_argument("--json", type=Path, help="file the results are added to")
    args = parser.parse_args()
    source = open_model(args.model)
    tokenizer, model = source.tokenizer(), load(source)
    text = Path(args.test).read_text(encoding="utf-8")[: args.windows * args.length * 16]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: args.windows * args.length].reshape(args.windows, args.length)
    tokens = calibration_tokens(tokenizer, args.calib, args.samples, args.calib_length, 0)
    more = calibration_tokens(tokenizer, args.calib, args.finetune_samples or args.samples, args.calib_length, 1)
    if args.share:
        measured = shared(model, args.runs, tokens, args)
    else:
        measured = ((run, *stage) for run in args.runs for stage in stages(model, run, tokens, more, args))
    for run, stage, seconds, result in measured:
        weights = {path: q for path, (q, _) in result.layers.items()}
        row = {
            "run": run,
            "stage": stage,
            "bits_per_weight": round(bits(weights), 4),
            "perplexity": quality(model, weights, result.plain, windows),
            "minutes": round(seconds / 60, 1),
            "peak_memory_bytes": peak_rss(),
            "settings": {
                k: v for k, v in vars(args).items() if k not in ("model", "test", "calib", "json", "runs", "keep")
            },
        }
        print(row, flush=True)
        if args.json:
            rows = json.loads(args.json.read_text())["results"] if args.json.exists() else []
            document = {"versions": versions(), "results": [*rows, row]}
            args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
