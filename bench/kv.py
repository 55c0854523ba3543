"""A quantized key-value cache against float16: bytes, perplexity, and the speed of decoding behind a long context.

    python bench/kv.py MODEL --test TEXT --formats kv4 kv2 kv4.kt.vt --windows 16 --context 4096 --json OUT

Perplexity is that of decoding token by token with the cache (see `compiler.runtime.kvsim`), over the first windows of
the text, tokenized once, nothing added. Speed is that of steps of one token after `--context` random tokens, caches
taken in turns; all caches attend from the same model, in its dtype. A context beyond the model's own positions (2048
for SmolLM2) says nothing about its predictions, and is as good as any other for time and bytes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from lowbit.compiler.job.evaluate import perplexity, tokenize
from lowbit.compiler.job.layers import versions
from lowbit.compiler.job.models import find_model
from lowbit.compiler.runtime.kvcache import IMPLEMENTATION, QuantizedCache
from lowbit.compiler.runtime.kvsim import simulated
from lowbit.quantizers.formats.kv import parse_kv_format

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def quality(model: Any, ids: Tensor, formats: list[str], windows: int, length: int) -> list[dict[str, Any]]:
    """Perplexity without and with every format."""
    model.set_attn_implementation("sdpa")
    rows = [{"cache": "float32", "perplexity": perplexity(model, ids, windows, length)}]
    print(rows[-1], flush=True)
    for text in formats:
        with simulated(model, text):
            value = perplexity(model, ids, windows, length)
        ratio = value / rows[0]["perplexity"]
        rows.append({"cache": str(parse_kv_format(text)), "perplexity": value, "ratio": round(ratio, 5)})
        print(rows[-1], flush=True)
    return rows


def memory(config: Any, formats: list[str], tokens: int) -> list[dict[str, Any]]:
    """Exact bytes of one sequence of `tokens` tokens, over all layers and heads."""
    dims = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_hidden_layers * config.num_key_value_heads
    half = heads * parse_kv_format("kv16").nbytes(tokens, dims)
    rows = [{"cache": "float16", "bytes": half}]
    for text in formats:
        fmt = parse_kv_format(text)
        size = heads * fmt.nbytes(tokens, dims)
        bits = round(fmt.bits_per_number(dims), 4)
        rows.append({"cache": str(fmt), "bytes": size, "times_smaller": round(half / size, 3), "bits": bits})
    return rows


def caches(model: Any, formats: list[str], tokens: int) -> dict[str, Any]:
    """Empty caches for `tokens` tokens by name."""
    made = {str(parse_kv_format(text)): QuantizedCache(model, text, max_tokens=tokens) for text in formats}
    return {"dynamic": DynamicCache(config=model.config), **made}


@torch.inference_mode()
def fill(cache: Any, model: Any, tokens: int, seed: int = 0) -> None:
    """Random keys and values, straight into the cache: what they are does not change how long a step takes."""
    config, rng = model.config, torch.Generator().manual_seed(seed)
    dims = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        for _ in range(tokens // 512):
            shape = (1, config.num_key_value_heads, 512, dims)
            keys, values = (torch.randn(shape, generator=rng).to(model.dtype) for _ in "kv")
            cache.update(keys, values, layer)


@torch.inference_mode()
def speed(model: Any, formats: list[str], context: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Median seconds of a step behind `context` tokens, with the share of attention and cache alone."""
    context = context // 512 * 512
    found = caches(model, formats, context + (steps + 1) * rounds + 1)
    times: dict[str, list[float]] = {name: [] for name in found}
    one = torch.tensor([[1]])
    for cache in found.values():
        model.set_attn_implementation(IMPLEMENTATION if isinstance(cache, QuantizedCache) else "sdpa")
        fill(cache, model, context)
    for _ in range(rounds):
        for name, cache in found.items():
            model.set_attn_implementation(IMPLEMENTATION if isinstance(cache, QuantizedCache) else "sdpa")
            model(one, past_key_values=cache)
            for _ in range(steps):
                begin = time.perf_counter()
                model(one, past_key_values=cache)
                times[name].append(time.perf_counter() - begin)
    base = statistics.median(times["dynamic"])
    none = _without(model, steps * rounds)
    rows = []
    for name, cache in found.items():
        seconds = statistics.median(times[name])
        size = cache.nbytes() if isinstance(cache, QuantizedCache) else _dynamic_bytes(cache)
        rows.append({"cache": name, "ms": round(1e3 * seconds, 3), "times_faster": round(base / seconds, 3),
                     "ms_of_the_cache": round(1e3 * (seconds - none), 3), "allocated": size})  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def _without(model: Any, steps: int) -> float:
    """Seconds of a step that attends to hardly anything."""
    model.set_attn_implementation("sdpa")
    cache, times = DynamicCache(config=model.config), []
    for _ in range(min(steps, 20)):
        begin = time.perf_counter()
        model(torch.tensor([[1]]), past_key_values=cache)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[2:])


def _dynamic_bytes(cache: DynamicCache) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder, GGUF file or hub id")
    parser.add_argument("--test", type=Path, help="text to measure perplexity on; left out without one")
    parser.add_argument("--formats", nargs="+", default=["kv8", "kv4", "kv4.kc64.vt.w64.rot", "kv4.kt.vt", "kv2"])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--context", type=int, default=4096, help="0 leaves speed out")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=FLOATS, default="float32", help="of the model whose speed is measured")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    args = parser.parse_args()
    source = find_model(args.model)
    model: Any = source.load()
    tokens = args.context or args.length
    document: dict[str, Any] = {
        "model": Path(source.name).name,
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "memory": {"tokens": tokens, "results": memory(model.config, args.formats, tokens)},
    }
    if args.test:
        text = args.test.read_text(encoding="utf-8")[: args.windows * args.length * 16]
        ids = tokenize(source.tokenizer(), text)
        rows = quality(model, ids, args.formats, args.windows, args.length)
        document["quality"] = {"test": args.test.name, "windows": args.windows, "length": args.length, "results": rows}
    if args.context:
        usable = [text for text in args.formats if parse_kv_format(text).gear is None]
        rows = speed(model.to(FLOATS[args.dtype]), usable, args.context, args.steps, args.rounds)
        document["speed"] = {"context": args.context, "dtype": args.dtype, "results": rows}
    print(json.dumps(document["memory"], indent=1))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
