"""auto-round beside lowbit's schemes: the same model, calibration tokens and windows.

auto-round wants an environment of its own (it pins other versions), so this runs in two steps:

    python bench/autoround_peer.py tokens MODEL --calib TEXT --work DIR           # lowbit's environment
    PEER/bin/python bench/autoround_peer.py quantize --work DIR --bits 2          # auto-round's
    python bench/autoround_peer.py score MODEL --test TEXT --work DIR             # lowbit's again

The first step writes the model, in float32, as a folder transformers reads, and the calibration tokens; the second its
weights after "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs"; the third prints
perplexity on the first windows of the test text. Bits per weight are `bits + (16 + bits) / group_size`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch


def tokens(args: argparse.Namespace) -> None:
    """What auto-round needs: a float model and the tokens that lowbit calibrates on."""
    from quality import load

    from lowbit.compiler.io.source import open_model
    from lowbit.quantizers.calibration import calibration_tokens

    source = open_model(args.model)
    tokenizer, model = source.tokenizer(), load(source)
    model.save_pretrained(args.work / "model")
    tokenizer.save_pretrained(args.work / "model")
    torch.save(calibration_tokens(tokenizer, args.calib, args.samples, args.length, 0), args.work / "tokens.pt")


def quantize(args: argparse.Namespace) -> None:
    """Run auto-round and keep its dequantized weights."""
    from auto_round import AutoRound  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(args.work / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = torch.load(args.work / "tokens.pt")
    data = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]
    format_ = {"bits": args.bits, "group_size": args.group_size, "sym": False}
    work = {"iters": args.iters, "nsamples": len(rows), "seqlen": rows.shape[1], "batch_size": args.batch}
    place = {"device_map": "cpu", "amp": False, "enable_torch_compile": False}
    started = time.monotonic()
    peer = AutoRound(model, AutoTokenizer.from_pretrained(folder), dataset=data, **format_, **work, **place)
    found = peer.quantize()
    changed = found[0] if isinstance(found, tuple) else found
    minutes = (time.monotonic() - started) / 60
    torch.save(dict(changed.state_dict()), args.work / "weights.pt")
    (args.work / "settings.json").write_text(json.dumps({**format_, **work, "minutes": round(minutes, 1)}))


def score(args: argparse.Namespace) -> None:
    """Perplexity with the weights of the second step."""
    from quality import load, perplexity

    from lowbit.compiler.io.source import open_model

    source = open_model(args.model)
    tokenizer, model = source.tokenizer(), load(source)
    own, changed = dict(model.named_parameters()), 0
    for name, value in torch.load(args.work / "weights.pt").items():
        if name in own and not torch.equal(value.float(), own[name].detach()):
            own[name].data.copy_(value)
            changed += 1
    text = args.test.read_text(encoding="utf-8")[: args.windows * args.window * 16]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: args.windows * args.window].reshape(args.windows, args.window)
    settings = json.loads((args.work / "settings.json").read_text())
    bits = settings["bits"] + (16 + settings["bits"]) / settings["group_size"]
    found = {"perplexity": perplexity(model, windows), "bits_per_weight": bits, "matrices": changed}
    print(json.dumps({**settings, **found}))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    first, second, third = (steps.add_parser(step.__name__) for step in (tokens, quantize, score))
    for step in (first, second, third):
        step.add_argument("--work", type=Path, required=True, help="folder for what the steps hand on")
    for step in (first, third):
        step.add_argument("model", help="model folder, GGUF file or hub id")
    first.add_argument("--calib", required=True, help="calibration text")
    first.add_argument("--samples", type=int, default=64)
    first.add_argument("--length", type=int, default=512)
    second.add_argument("--bits", type=int, default=2)
    second.add_argument("--group-size", type=int, default=64)
    second.add_argument("--iters", type=int, default=100)
    second.add_argument("--batch", type=int, default=4)
    third.add_argument("--test", type=Path, required=True)
    third.add_argument("--windows", type=int, default=16)
    third.add_argument("--window", type=int, default=1024)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    {"tokens": tokens, "quantize": quantize, "score": score}[args.step](args)


if __name__ == "__main__":
    main()
