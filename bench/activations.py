"""Perplexity of quantized activations and key-value caches, alone and with quantized weights.

    python bench/activations.py MODEL --test TEXT --calib TEXT --windows 2 --json out.json [--rows a4 fmpq20 ...]

Every row is a scheme. Rows that leave weights alone (`float`) rewrite the float model and round the inputs of its
layers; the others quantize the weights too, as `lowbit.quantize` would. Rounding is done with hooks, so that figures do
not depend on kernels. Perplexity is over the first windows of the test text, tokenized once, cut into consecutive
windows, nothing added.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowbit.compiler.frontend.structure import model_structure
from lowbit.compiler.io.rewritten import rewrite_module
from lowbit.compiler.io.source import open_model
from lowbit.compiler.job.blocks import linears_in
from lowbit.compiler.job.inmemory import choose
from lowbit.compiler.job.layers import versions
from lowbit.compiler.job.models import load_dense
from lowbit.compiler.job.prepare import ModuleHost, Preparation
from lowbit.quantizers.calibration import calibration_tokens
from lowbit.quantizers.formats import parse_activation, parse_format
from lowbit.quantizers.formats.kv import KVFormat
from lowbit.quantizers.hadamard import rotate
from lowbit.quantizers.inputs import LayerInput, input_hooks, wide_share
from lowbit.quantizers.kv import fake_quantize
from lowbit.quantizers.methods import make_method
from lowbit.quantizers.methods.fmpq import group_gains
from lowbit.quantizers.observe import SiteStats
from lowbit.quantizers.scheme import PRESETS, Scheme

FLOAT = "int8.ch.sym"  # stands for weights that stay as they are

FMPQ = {"method": "fmpq", "activation": "int4.g64", "rewrites": ["permute"]}
ROWS: dict[str, dict[str, Any]] = {
    "float": {},
    "a8": {"activation": "int8.token"},
    "a8-smooth": {"activation": "int8.token", "rewrites": ["smooth"]},
    "a8-smooth-search": {"activation": "int8.token", "rewrites": ["smooth{search=true}"]},
    "a8-outliers": {"activation": "int8.token.w32x16", "rewrites": ["permute{outliers=6.0}"]},
    "a8-g64": {"activation": "int8.g64"},
    "a-e4m3": {"activation": "e4m3.token"},
    "a4": {"activation": "int4.token"},
    "a4-g64": {"activation": "int4.g64"},
    "a4-g64-asym": {"activation": "int4.g64.asym"},
    "a4-g32-asym": {"activation": "int4.g32.asym"},
    "fmpq10": {**FMPQ, "options": {"share": 0.1}},
    "fmpq20": {**FMPQ, "options": {"share": 0.2}},
    "fmpq20-greedy": {**FMPQ, "options": {"share": 0.216, "budget": "greedy"}},
    "fmpq20-moment": {**FMPQ, "options": {"share": 0.2}, "rewrites": ["permute{rank=moment}"]},
    "fmpq20-smooth": {**FMPQ, "options": {"share": 0.2}, "rewrites": ["smooth", "permute"]},
    "fmpq30": {**FMPQ, "options": {"share": 0.3}},
    "fmpq10-asym": {**FMPQ, "options": {"share": 0.1}, "activation": "int4.g64.asym"},
    "fmpq20-asym": {**FMPQ, "options": {"share": 0.2}, "activation": "int4.g64.asym"},
    "fmpq30-asym": {**FMPQ, "options": {"share": 0.3}, "activation": "int4.g64.asym"},
    "fmpq30-asym-c95": {**FMPQ, "options": {"share": 0.3}, "activation": "int4.g64.c95.asym"},
    "fmpq30-asym-g32": {**FMPQ, "options": {"share": 0.3}, "activation": "int4.g32.asym"},
    "fmpq20-no-permutation": {**FMPQ, "options": {"share": 0.2}, "rewrites": [], "gather_blocks": True},
    "fmpq20-static": {**FMPQ, "options": {"share": 0.2}, "activation": "int4.g64.static"},
    "rotate-token": {"activation": "int4.token.c90", "rewrites": ["rotate"]},
    "rotate-g64": {"activation": "int4.g64", "rewrites": ["rotate"]},
    "rotate-offline-g64": {"activation": "int4.g64", "rewrites": ["rotate{online=false}"]},
    "rotate-fmpq20": {**FMPQ, "options": {"share": 0.2}, "rewrites": ["rotate", "permute"]},
    "kv4": {"kv": "kv4.kc64.vt.w64"},
    "kv4-token": {"kv": "kv4.kt.vt"},
    "kv4-token-rot": {"kv": "kv4.kt.vt.rot"},
    "kv4-values": {"kv": "k16v4.vt"},
    "fmpq20-kv4": {**FMPQ, "options": {"share": 0.2}, "kv": "kv4.kc64.vt.w64"},
    "w4a16": {"preset": "w4a16"},
    "w8a8": {"preset": "w8a8"},
    "w8a8-int8": {"preset": "w8a8-int8"},
    "fp8": {"preset": "fp8"},
    "w6a8": {"preset": "w6a8"},
    "w4a8": {"preset": "w4a8"},
    "w4a8-qserve": {"preset": "w4a8-qserve"},
    "w4a4": {"preset": "w4a4"},
    "w4a4-sym": {"preset": "w4a4", "activation": "int4.g64"},
    "w4a4-g32": {"preset": "w4a4", "activation": "int4.g32.asym"},
    "w4a4-quarot": {"preset": "w4a4-quarot"},
    "w4a4-atom": {"preset": "w4a4-atom"},
    "w4a4kv4": {"preset": "w4a4kv4"},
    "w4a4kv4-g32": {"preset": "w4a4kv4", "activation": "int4.g32.asym"},
    "w4a4kv4-g32-kc32": {"preset": "w4a4kv4", "activation": "int4.g32.asym", "kv": "kv4.kc32.vt.w64"},
    "w4a4kv4-g32-rot": {"preset": "w4a4kv4", "activation": "int4.g32.asym", "kv": "kv4.kc64.vt.w64.rot"},
    "w4a16-plain": {"preset": "w4a16", "options": {"asymmetric": 0.0}},
    "w4a8-plain": {"preset": "w4a8", "options": {"asymmetric": 0.0}},
    "w4a4-plain": {"preset": "w4a4", "options": {"asymmetric": 0.0, "aware": False}},
    "w4a4kv4-plain": {"preset": "w4a4kv4", "options": {"asymmetric": 0.0, "aware": False}},
    "w4a4-unaware": {"preset": "w4a4", "options": {"aware": False}},
    "w4a4kv4-unaware": {"preset": "w4a4kv4", "options": {"aware": False}},
}
"""Name -> scheme: changes to a preset, which quantizes weights too, or, without one, to a model with float weights."""


@dataclass
class Watched(ModuleHost):
    """A model in memory; what the float model's layers read is found out once for all rows."""

    known: ClassVar[dict[str, SiteStats]] = {}

    def observe(self, readers: Sequence[str], inputs: Mapping[str, LayerInput]) -> dict[str, SiteStats]:
        if self.edits or inputs:
            return super().observe(readers, inputs)
        if not set(readers) <= set(self.known):
            self.known.update(super().observe(readers, inputs))
        return {name: self.known[name] for name in readers}


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor) -> float:
    """exp of the mean negative log-likelihood per predicted token."""
    total = 0.0
    for window in windows:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return float(torch.tensor(total / (windows.shape[0] * (windows.shape[1] - 1))).exp())


@contextmanager
def cache_rounding(kv: KVFormat | None) -> Iterator[None]:
    """Keys (after the rotary embedding) and values as a cache in `kv` would give them back, all tokens of them."""
    if kv is None:
        yield
        return
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kv.rotate:
            query, key = (rotate(t, t.shape[-1]) for t in (query, key))
        key, value = rounded(key, kv.key), rounded(value, kv.value)
        return plain(module, query, key, value, *args, **kwargs)

    def rounded(x: Tensor, side: Any) -> Tensor:
        whole = x.shape[-2] - x.shape[-2] % side.token_group
        return torch.cat([fake_quantize(x[..., :whole, :], side), x[..., whole:, :]], -2) if side.quantized else x

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = plain


def scheme_of(name: str) -> tuple[Scheme, bool]:
    """The row's scheme, and whether it quantizes weights."""
    values = {k: v for k, v in ROWS[name].items() if k not in ("preset", "gather_blocks")}
    preset = ROWS[name].get("preset")
    if preset is None:
        return Scheme.from_dict({"name": name, "weight": FLOAT, "method": "rtn", **values}), False
    whole = PRESETS[preset].to_dict()
    values["options"] = {**whole["options"], **values.get("options", {})}
    return Scheme.from_dict({**whole, **values}), True


def activations_only(model: nn.Module, scheme: Scheme, tokens: Tensor) -> Mapping[str, LayerInput]:
    """Rewrite `model` in place; what its layers do with their inputs."""
    structure = model_structure(model)
    paths = {p: m for p, m in linears_in(model, "").items() if scheme.format_for(p) is not None}
    shapes = {p: (m.out_features, m.in_features) for p, m in paths.items()}
    method = make_method(scheme.method, scheme.options)
    formats = dict.fromkeys(paths, parse_format(FLOAT))
    return Preparation(Watched(model, tokens), structure, scheme, method, formats, shapes).run().inputs


def gathered_blocks(model: nn.Module, scheme: Scheme, tokens: Tensor) -> Mapping[str, LayerInput]:
    """As many wide groups as with a permutation, those with the largest gain, without reordering any channels.

    (Groups are moved as a whole, which changes nothing but where the wide ones stand.)
    """
    structure = model_structure(model)
    host, fmt = Watched(model, tokens), parse_activation("int4.g64")
    sites = [s for s in structure.sites if scheme.format_for(s.name) is not None]
    stats = host.observe([s.name for s in sites], {})
    gains = {}
    for site in sites:
        weights = [host.tensor(structure.weights[p]).float() for p in site.consumers]
        gains[site.name] = group_gains(stats[site.name], fmt, weights)
    method = make_method("fmpq", scheme.options)
    counts = method.widths(gains, dict.fromkeys(gains, fmt))  # type: ignore[attr-defined]
    wide = {n: torch.argsort(gs, descending=True)[: counts[n]].tolist() for n, gs in gains.items()}
    found = {}
    for site in sites:
        first = wide[site.name]
        blocks = [*first, *(i for i in range(site.width // 64) if i not in first)]
        order = (torch.tensor(blocks)[:, None] * 64 + torch.arange(64)).flatten()
        what = LayerInput(replace(fmt, wide=len(first)), order)
        found.update(dict.fromkeys(site.consumers, what))
    return found


@dataclass
class Chosen:
    """What `choose` said last: rows that differ in nothing but their cache stand side by side and share it."""

    scheme: Scheme | None = None
    choice: Any = None

    def get(self, model: nn.Module, scheme: Scheme, tokens: Tensor) -> Any:
        alone = replace(scheme, kv=None, name="")
        if self.scheme != alone:
            self.scheme, self.choice = alone, choose(model, scheme, tokens)
        return self.choice


def row(name: str, model: nn.Module, tokens: Tensor, windows: Tensor, chosen: Chosen) -> dict[str, Any]:
    """One measurement; the model is left as it is."""
    scheme, weights = scheme_of(name)
    started = time.monotonic()
    changed = copy.deepcopy(model)
    if weights:
        choice = chosen.get(changed, scheme, tokens)
        for edits in choice.edits:
            rewrite_module(changed, edits)
        for path, (q, _) in choice.layers.items():
            changed.get_submodule(path).weight.data.copy_(q.dequantize())  # type: ignore[operator, union-attr]
        inputs = choice.inputs
    else:
        prepare = gathered_blocks if ROWS[name].get("gather_blocks") else activations_only
        inputs = prepare(changed, scheme, tokens) if scheme.activation is not None else {}
    prepared = time.monotonic() - started
    linears = linears_in(changed, "")
    with input_hooks(linears, inputs, rounding=True), cache_rounding(scheme.kv):
        value = perplexity(changed, windows)
    widths = {p: m.in_features for p, m in linears.items()}
    return {
        "row": name,
        "scheme": scheme.to_dict() if weights else {**scheme.to_dict(), "weight": "float"},
        "perplexity": value,
        "share_of_8_bits": wide_share(inputs, widths) if inputs else None,
        "seconds": {"prepare": round(prepared), "total": round(time.monotonic() - started)},
    }


def measure(args: argparse.Namespace) -> None:
    """Every row that was asked for; the file is written after each."""
    source = open_model(args.model)
    tokenizer, model = source.tokenizer(), load_dense(source)
    text = Path(args.test).read_text(encoding="utf-8")[: args.windows * args.length * 16]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: args.windows * args.length].reshape(args.windows, args.length)
    tokens = calibration_tokens(tokenizer, args.calib, args.samples, args.calib_length, args.seed)
    document: dict[str, Any] = {
        "model": source.origin,
        "calibration": {"file": Path(args.calib).name, "samples": args.samples, "length": args.calib_length},
        "test": {"file": Path(args.test).name, "windows": args.windows, "length": args.length},
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": versions(),
        "results": [],
    }
    if args.json and args.json.exists():
        document["results"] = json.loads(args.json.read_text(encoding="utf-8"))["results"]
    chosen = Chosen()
    for name in args.rows:
        document["results"] = [r for r in document["results"] if r["row"] != name]
        found = row(name, model, tokens, windows, chosen)
        base = next((r["perplexity"] for r in document["results"] if r["row"] == "float"), found["perplexity"])
        document["results"].append({**found, "over_float": found["perplexity"] / base - 1})
        print({k: v for k, v in document["results"][-1].items() if k != "scheme"}, flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder, GGUF file or hub id")
    parser.add_argument("--test", required=True, help="text to measure perplexity on")
    parser.add_argument("--calib", required=True, help="calibration text, or pydoc")
    parser.add_argument(
        "--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--calib-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write; rows it has already are kept, or replaced when named")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
