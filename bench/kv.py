"""A quantized key-value cache against float16: bytes, perplexity, and the speed of decoding behind a long context.

    python bench/kv.py MODEL --test TEXT --formats kv4 kv2 kv4.kt.vt --windows 16 --context 4096 --decode 256 --json OUT

Three measurements. *Bytes* of the tensors that hold `--context` tokens, scales and minima included, beside the
format's own formula: a difference is an error. *Perplexity*: with the real cache, of the last `--decode` tokens of a
context, one step each, behind a prompt of the others (whose keys and values are computed once, as a prompt attends to
its own as they are); and, with `--windows`, that of decoding whole windows token by token (see
`compiler.runtime.kvsim`). Text is tokenized once, nothing added. *Speed* of steps of one token behind `--context`
random tokens, caches taken in turns; all caches attend from the same model, in its dtype. What others are compared
with is a float16 cache (`kv16`) read by the same attention; `dynamic` is transformers' own, in the model's dtype, with
torch's attention. A context beyond the model's own positions says nothing about its predictions, and is as good as any
other for time and bytes.
"""

from __future__ import annotations

import argparse
import json
import math
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

BASE = "kv16"
"""Keys and values in float16, nothing quantized."""

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


def held_bytes(cache: QuantizedCache, tokens: int) -> int:
    """Bytes of the cache's tensors that hold something of `tokens` tokens: not the room for more of them."""
    total = 0
    for layer in cache.layers:
        for letter, side in layer.spec.sides:
            stored = layer.fmt.stored(side, tokens)
            for name, tensor in layer.state.items():
                if name == f"{letter}_window":
                    total += tensor[:, :, 0].nbytes * (tokens - stored)
                elif name[0] == letter:  # codes, scales and what corrects them: so much for so many tokens
                    total += tensor.nbytes * stored // layer.capacity
    return total


def memory(model: Any, formats: list[str], tokens: int) -> list[dict[str, Any]]:
    """Bytes of one sequence of `tokens` tokens, over all layers and heads, as held and as the formula has them."""
    config, rows = model.config, []
    dims = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_hidden_layers * config.num_key_value_heads
    half = heads * parse_kv_format(BASE).nbytes(tokens, dims)
    for text in [BASE, *formats]:
        fmt, cache = parse_kv_format(text), QuantizedCache(model, text, max_tokens=tokens)
        for layer in cache.layers:
            layer.lazy_initialization(*[torch.empty(1, config.num_key_value_heads, 0, dims)] * 2)
        size, held = heads * fmt.nbytes(tokens, dims), held_bytes(cache, tokens)
        if held != size:
            raise SystemExit(f"{fmt}: {held} bytes are held where the format's formula says {size}")
        bits, smaller = round(16 * held / half, 4), round(half / held, 3)
        rows.append(
            {"cache": str(fmt), "bytes": held, "allocated": cache.nbytes(), "bits": bits, "times_smaller": smaller}
        )
    return rows


@torch.inference_mode()
def decoded(model: Any, ids: Tensor, formats: list[str], context: int, steps: int) -> list[dict[str, Any]]:
    """Perplexity of tokens [context - steps, context) of `ids`, decoded one by one with every cache."""
    start, config, rows = context - steps, model.config, list[dict[str, Any]]()
    model.set_attn_implementation("sdpa")
    prompt = DynamicCache(config=config)
    first = model(ids[None, :start], past_key_values=prompt, logits_to_keep=1).logits[0, -1].float()
    model.set_attn_implementation(IMPLEMENTATION)
    for text in [BASE, *formats]:
        cache = QuantizedCache(model, text, max_tokens=context)
        for index, layer in enumerate(prompt.layers):
            cache.update(layer.keys, layer.values, index)
        logits, loss = first, 0.0
        for at in range(start, context):
            loss -= float(logits.log_softmax(-1)[ids[at]])
            logits = model(ids[None, at : at + 1], past_key_values=cache).logits[0, -1].float()
        value = math.exp(loss / steps)
        base = rows[0]["perplexity"] if rows else value
        rows.append({"cache": str(parse_kv_format(text)), "perplexity": value, "ratio": round(value / base, 5)})
        print(rows[-1], flush=True)
    return rows


def caches(model: Any, formats: list[str], tokens: int) -> dict[str, Any]:
    """Empty caches for `tokens` tokens by name."""
    made = {str(parse_kv_format(t)): QuantizedCache(model, t, max_tokens=tokens) for t in [BASE, *formats]}
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
    base = statistics.median(times[BASE])
    none = _without(model, steps * rounds)
    rows = []
    for name, cache in found.items():
        seconds = statistics.median(times[name])
        size = cache.nbytes() if isinstance(cache, QuantizedCache) else _dynamic_bytes(cache)
        rows.append({"cache": name, "ms": round(1e3 * seconds, 3), "tokens_per_second": round(1 / seconds, 2),
                     "times_faster": round(base / seconds, 3),
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
    return statistics.median(times[2:] or times)


def _dynamic_bytes(cache: DynamicCache) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder, GGUF file or hub id")
    parser.add_argument("--test", type=Path, help="text to measure perplexity on; left out without one")
    parser.add_argument("--formats", nargs="+", default=["kv8", "kv4", "kv4.kc64.vt.w64.rot", "kv4.kt.vt", "kv2"])
    parser.add_argument("--windows", type=int, default=0, help="windows decoded whole; 0 for none")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--context", type=int, default=4096, help="tokens in the cache; 0: neither decoding nor speed")
    parser.add_argument("--decode", type=int, default=256, help="tokens of the context that are decoded one by one")
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
        "memory": {"tokens": tokens, "results": memory(model, args.formats, tokens)},
    }
    if args.test:
        text = args.test.read_text(encoding="utf-8")[: max(args.windows * args.length, args.context) * 16]
        ids = tokenize(source.tokenizer(), text)
    if args.test and args.context:
        rows = decoded(model, ids, args.formats, args.context, args.decode)
        document["decoded"] = {"test": args.test.name, "context": args.context, "tokens": args.decode, "results": rows}
    if args.test and args.windows:
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
