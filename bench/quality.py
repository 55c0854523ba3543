"""Perplexity of weight-only quantization against the amount of calibration data.

    python bench/quality.py MODEL --test TEXT --calib TEXT --formats int4.g64.sym int3.g64.asym --samples 16 64 128

Perplexity is over the first windows of the test text, tokenized once, cut into consecutive windows, nothing added. In
parallel mode one pass over the calibration text serves every format and every size, because the statistics come from
the float model; in sequential mode each combination is a run of its own. With `--rewrite` the model is rewritten first,
as a run with the first of the formats and the largest size would do it, and everything measured on the rewritten one.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.compiler.io.source import ModelSource, open_model
from lowbit.compiler.job.activations import Activations
from lowbit.compiler.job.blocks import Trunk, find_blocks, linears_in, materialize
from lowbit.compiler.job.inmemory import choose_codes
from lowbit.compiler.job.layers import select_layers, versions
from lowbit.compiler.job.prepare import prepare_model
from lowbit.compiler.runtime.paths import prepare_search
from lowbit.quantizers.calibration import HessianAccumulator, InputGroups, LayerStats, calibration_tokens
from lowbit.quantizers.formats import Format, parse_format, scalar_format
from lowbit.quantizers.methods import Method, in_mode, make_method
from lowbit.quantizers.rewrites import parse_rewrites
from lowbit.quantizers.scheme import Scheme
from lowbit.quantizers.weights import QWeight

Codes = dict[str, QWeight]


def load(source: ModelSource) -> nn.Module:
    """The model in float32."""
    names = frozenset(source.names())
    model = source.empty_model()
    materialize(model, "", lambda name: source.tensor(name) if name in names else None)
    model.tie_weights()  # type: ignore[operator]
    return model


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood per predicted token."""
    total = 0.0
    for window in windows:
        logits = model(input_ids=window[None]).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return float(torch.tensor(total / (windows.shape[0] * (windows.shape[1] - 1))).exp())


@torch.no_grad()
def with_codes(model: nn.Module, codes: Codes, windows: Tensor) -> float:
    """Perplexity with the coded layers' weights replaced; the model is restored afterwards."""
    kept = {path: model.get_submodule(path).weight.detach().clone() for path in codes}
    for path, qtensor in codes.items():
        model.get_submodule(path).weight.copy_(qtensor.dequantize())  # type: ignore[operator, union-attr]
    value = perplexity(model, windows)
    for path, weight in kept.items():
        model.get_submodule(path).weight.copy_(weight)  # type: ignore[operator, union-attr]
    return value


@torch.no_grad()
def statistics(model: nn.Module, tokens: Tensor, sizes: Sequence[int]) -> Iterator[dict[str, dict[int, LayerStats]]]:
    """Per block: statistics of every layer after the first `size` samples, for every size, from the float model."""
    blocks = find_blocks(model)
    assert blocks is not None
    trunk = Trunk(model, blocks)
    calls = trunk.calls(tokens[:2])
    width = trunk.embed(tokens[:1]).shape[-1]
    hidden = Activations((*tokens.shape, width), 4, create=True)  # type: ignore[arg-type]
    for samples in hidden.batches:
        hidden.write(samples, trunk.embed(tokens[samples]))
    for index, block in enumerate(blocks.modules):
        linears = linears_in(block, blocks.name(index))
        found = InputGroups(linears)
        with found:
            calls[index](block, hidden.read(slice(0, 1)))
        groups = InputGroups(linears, 0, found.order, range(len(found.order)), False)
        out: dict[str, dict[int, LayerStats]] = {path: {} for path in linears}
        with groups:
            for samples, states in hidden:
                groups.start()
                hidden.write(samples, calls[index](block, states))
                if samples.stop in sizes:
                    _snapshot(groups.order, groups.accumulators, samples.stop, out)
        yield out


def _snapshot(
    order: list[list[str]],
    accumulators: dict[int, HessianAccumulator],
    size: int,
    out: dict[str, dict[int, LayerStats]],
) -> None:
    for index, accumulator in accumulators.items():
        stats = accumulator.stats()
        small = LayerStats(stats.hessian.float(), stats.tokens)
        for path in order[index]:
            out[path][size] = small


def parallel(
    model: nn.Module, tokens: Tensor, sizes: Sequence[int], formats: Sequence[Format], method: Method
) -> dict[tuple[str, int], Codes]:
    """Codes for every format and size from one pass over the tokens."""
    found: dict[tuple[str, int], Codes] = {(str(fmt), size): {} for fmt in formats for size in sizes}
    for number, block in enumerate(statistics(model, tokens, sizes)):
        for path, by_size in block.items():
            weight = model.get_submodule(path).weight.detach()
            assert isinstance(weight, Tensor)
            for size, stats in by_size.items():
                for fmt in formats:
                    prepare_search(fmt)
                    found[str(fmt), size][path] = method.quantize(weight, fmt, stats).qtensor
        print(f"block {number} done", flush=True)
    return found


def rewrite(model: nn.Module, tokens: Tensor, args: argparse.Namespace, options: dict[str, Any]) -> None:
    """Rewrite the model in place."""
    scheme = Scheme("bench", parse_format(args.formats[0]), args.method, options, rewrites=parse_rewrites(args.rewrite))
    selection = select_layers(model, scheme, lambda path: True, need_blocks=False)
    prepared, _ = prepare_model(model, tokens, selection, scheme, make_method(args.method, options))
    for note in prepared.notes:
        print(note, flush=True)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was asked for."""
    source = open_model(args.model)
    tokenizer, model = source.tokenizer(), load(source)
    text = Path(args.test).read_text(encoding="utf-8")[: args.windows * args.length * 16]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: args.windows * args.length].reshape(args.windows, args.length)
    tokens = calibration_tokens(tokenizer, args.calib, max(args.samples), args.calib_length, args.seed)
    options = json.loads(args.options)
    in_mode(make_method(args.method, options), args.mode == "sequential")
    if args.rewrite:
        rewrite(model, tokens, args, options)
    rows: list[dict[str, Any]] = [{"format": "float32", "perplexity": perplexity(model, windows)}]
    print(rows[0], flush=True)
    if args.mode == "parallel":
        formats = [scalar_format(text) for text in args.formats]
        codes = parallel(model, tokens, args.samples, formats, make_method(args.method, options))
        for (fmt, size), layers in codes.items():
            rows.append({"format": fmt, "samples": size, "perplexity": with_codes(model, layers, windows)})
            print(rows[-1], flush=True)
    else:
        for text in args.formats:
            for size in args.samples:
                scheme = Scheme("bench", parse_format(text), args.method, options)
                started = time.monotonic()
                found = choose_codes(model, scheme, tokens[:size], sequential=True)
                seconds = time.monotonic() - started
                value = with_codes(model, {path: q for path, (q, _) in found.items()}, windows)
                rows.append({"format": text, "samples": size, "perplexity": value, "seconds": round(seconds)})
                print(rows[-1], flush=True)
    return {
        "model": source.origin,
        "method": {"name": args.method, "mode": args.mode, "options": options, "rewrites": args.rewrite},
        "calibration": {"file": Path(args.calib).name, "length": args.calib_length, "seed": args.seed},
        "test": {"file": Path(args.test).name, "windows": args.windows, "length": args.length},
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "results": rows,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder, GGUF file or hub id")
    parser.add_argument("--test", required=True, help="text to measure perplexity on")
    parser.add_argument("--calib", required=True, help="calibration text, or pydoc")
    parser.add_argument("--formats", nargs="+", default=["int4.g64.sym", "int3.g64.asym"])
    parser.add_argument("--samples", nargs="+", type=int, default=[16, 64, 128, 256])
    parser.add_argument("--calib-length", type=int, default=512)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--options", default="{}", help="method options as JSON")
    parser.add_argument(
        "--rewrite", nargs="+", default=[], help="what is done to the float model first, such as rotate"
    )
    parser.add_argument("--mode", choices=["parallel", "sequential"], default="parallel")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    document = measure(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
