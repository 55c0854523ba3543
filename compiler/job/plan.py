"""The dry run: what quantizing a model will give and cost, from file headers alone.

Sizes are exact arithmetic over tensor shapes. Memory and time are estimates: their model is written below, term by
term, and the time carries a range because the machine may be busy. Nothing is loaded, and nothing is written.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowbit.codegen import BACKENDS, load_backend
from lowbit.codegen.spec import KernelSpec, rounded_products
from lowbit.compiler.errors import LowbitError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import Target, host_target
from lowbit.compiler.job.blocks import linears_in
from lowbit.compiler.job.consumers import consumers
from lowbit.compiler.job.foresee import Foreseen, foresee
from lowbit.compiler.job.layers import select_layers
from lowbit.compiler.job.prepare import calibrates, check_inputs
from lowbit.quantizers.formats import (
    ChoiceFormat,
    Format,
    WeightFormat,
    parse_activation,
    parse_format,
    sixteen_bit_products,
)
from lowbit.quantizers.methods import METHODS, Fmpq, Method, asymmetric, in_mode, make_method
from lowbit.quantizers.scheme import Scheme
from lowbit.quantizers.weights import stored_shapes

if TYPE_CHECKING:
    from lowbit.compiler.io.source import ModelSource

__all__ = ["LayerPlan", "Plan", "Sizes", "make_plan", "runs_on"]

_SHARED_INPUT = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
_PROCESS_BYTES = 650e6  # Python with torch and transformers loaded
_RANGE = (0.5, 3.0)  # an idle machine with a good BLAS, a busy one
# GPTQ measured on one core at 82 GFLOP/s, four shapes: seconds = K (1.65e-4 + 8.6e-7 N + 4.2e-7 K); rounding with a
# scale search 2e-7 per weight. What grows with the matrix is counted as operations, so that it scales with the machine.
_COLUMN_SECONDS = 1.65e-4
_PER_WEIGHT, _PER_PAIR, _ROUNDING = 70.0, 34.0, 17.0
_LOAD_SECONDS = 6.0  # imports and opening the model


@dataclass(frozen=True)
class LayerPlan:
    """One linear layer: [n, k], the format it gets (None: kept), stored bytes, what stands in the way, and what its
    inputs are rounded to."""

    path: str
    n: int
    k: int
    format: str | None
    nbytes: int
    problem: str = ""
    activation: str = ""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight of this layer."""
        return 8 * self.nbytes / (self.n * self.k)


@dataclass(frozen=True)
class Sizes:
    """Bytes and bits per weight, of the whole model and of its quantized layers."""

    parameters: int
    quantized_parameters: int
    source_bytes: int
    output_bytes: int
    quantized_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Over every parameter: embeddings, head and norms included."""
        return 8 * self.output_bytes / max(self.parameters, 1)

    @property
    def bits_per_quantized_weight(self) -> float:
        """Over the quantized layers only, scales and zero points included."""
        return 8 * self.quantized_bytes / max(self.quantized_parameters, 1)


@dataclass(frozen=True)
class Plan:
    """What a run will do; `problems` make it impossible, `notes` are for the user to know."""

    model: str
    scheme: Mapping[str, Any]
    layers: tuple[LayerPlan, ...]
    sizes: Sizes
    peak_memory: int
    disk_needed: int
    disk_free: int
    seconds: tuple[float, float, float]
    runs: Mapping[str, str | None]
    consumers: Mapping[str, str]
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = field(default=())
    activations: Mapping[str, str] = field(default_factory=dict)

    @property
    def possible(self) -> bool:
        """False when `quantize run` would refuse."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        low, likely, high = self.seconds
        sizes = {
            **asdict(self.sizes),
            "bits_per_weight": self.sizes.bits_per_weight,
            "bits_per_quantized_weight": self.sizes.bits_per_quantized_weight,
        }
        return {
            "model": self.model,
            "possible": self.possible,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "scheme": dict(self.scheme),
            "activations": dict(self.activations),
            "sizes": sizes,
            "peak_memory_bytes": self.peak_memory,
            "disk_bytes": {"needed": self.disk_needed, "free": self.disk_free},
            "seconds": {"low": low, "likely": likely, "high": high},
            "backends": {name: why or "runs every layer" for name, why in self.runs.items()},
            "consumers": dict(self.consumers),
            "layers": [{**asdict(layer), "bits_per_weight": layer.bits_per_weight} for layer in self.layers],
        }


def make_plan(
    source: ModelSource, scheme: Scheme, *, name: str, samples: int, length: int, sequential: bool, out: Path
) -> Plan:
    """The plan of quantizing `source` with `scheme` on `samples` x `length` calibration tokens.

    `out` is the folder that would be written; only the free space of its disk is looked at.
    """
    layers = tuple(_layers(source, scheme))
    chosen = [layer for layer in layers if layer.format and not layer.problem]
    foreseen = foresee(source, scheme)
    sizes = _sizes(source, chosen, name, foreseen)
    problems = [f"{layer.path}: {layer.problem}" for layer in layers if layer.problem][:5]
    kept_notes: tuple[str, ...] = ()
    method = make_method(scheme.method, scheme.options)
    try:
        selection = select_layers(
            source.empty_model(), scheme, _owner(source), need_blocks=METHODS[scheme.method].needs_hessian
        )
        kept_notes = selection.notes
        method = in_mode(method, sequential)
        check_inputs(scheme, method, selection.formats, selection.shapes)
    except LowbitError as e:
        problems = problems or [e.render()]
    needed = sizes.output_bytes + sizes.quantized_bytes  # the journal holds finished layers until the export is done
    free = shutil.disk_usage(next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())).free
    if needed > free:
        problems.append(f"{needed / 1e9:.1f} GB of disk are needed, {free / 1e9:.1f} GB are free")
    tokens = samples * length if method.needs_hessian else 0
    seen = samples * length if calibrates(scheme, method, [x.path for x in chosen]) else 0
    return Plan(
        name,
        scheme.to_dict(),
        layers,
        sizes,
        _peak_memory(layers, source, tokens or seen, asymmetric(method) > 0) + _finetune_memory(chosen, scheme, tokens),
        needed,
        free,
        _seconds(chosen, tokens, sequential, scheme, method, seen),
        _runs(chosen),
        consumers(chosen, scheme, source.empty_model()),
        (*kept_notes, *_notes(layers, chosen), *(_untied_note(p) for p in foreseen.untied)),
        tuple(problems),
        _activation_lines(foreseen, scheme, chosen),
    )


def _activation_lines(foreseen: Foreseen, scheme: Scheme, chosen: list[LayerPlan]) -> dict[str, str]:
    """What inputs and the cache will be rounded to, and which rewrites can be done where; nothing where none are."""
    lines: dict[str, str] = {}
    rounded = [x for x in chosen if x.activation]
    if rounded:
        columns = sum(x.k for x in rounded)
        bits = sum(parse_activation(x.activation).bits_per_value(x.k) * x.k for x in rounded) / columns
        lines["activations"] = f"{', '.join(dict.fromkeys(x.activation for x in rounded))}: {bits:.2f} bits a value"
        share = scheme.options.get("share", Fmpq.share) if scheme.method == "fmpq" else 0
        lines["activations"] += f", about {share:.0%} of them 8 bits wide" if share else ""
    if foreseen.line:
        lines["rewrites"] = foreseen.line
    return {**lines, **({"key-value cache": str(scheme.kv)} if scheme.kv is not None else {})}


def _layers(source: ModelSource, scheme: Scheme) -> Iterable[LayerPlan]:
    """Every linear layer, with the format the scheme gives it."""
    owns = _owner(source)
    for path, module in linears_in(source.empty_model(), "").items():
        n, k = module.out_features, module.in_features
        fmt = scheme.format_for(path) if owns(path) else None
        if fmt is None:
            yield LayerPlan(path, n, k, None, 0)
            continue
        try:
            fmt.check(n, k, path)
        except LowbitError as e:
            yield LayerPlan(path, n, k, str(fmt), 0, f"{e.code} {e.message} ({e.hint})")
            continue
        yield LayerPlan(path, n, k, str(fmt), _stored_bytes(fmt, n, k), "", str(scheme.activation_for(path) or ""))


def _owner(source: ModelSource) -> Callable[[str], bool]:
    """Whether the module at a path has a weight of its own; tied ones are kept."""
    stored = set(source.names())
    return lambda path: f"{path}.weight" in stored


def _stored_bytes(fmt: WeightFormat, n: int, k: int) -> int:
    """Bytes of the checkpoint's tensors; of a choice the most."""
    if isinstance(fmt, ChoiceFormat):
        return max(_stored_bytes(candidate, n, k) for candidate in fmt.candidates)
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in stored_shapes(fmt, n, k).values())


def _sizes(source: ModelSource, chosen: list[LayerPlan], name_of_model: str, foreseen: Foreseen) -> Sizes:
    from lowbit.compiler.io.checkpoint import stored_dtype

    weights = {f"{layer.path}.weight": layer for layer in chosen}
    parameters, kept = 0, foreseen.bytes_more(source)
    for name in source.names():
        count = math.prod(source.shape(name))
        parameters += count
        if name not in weights:
            kept += count * stored_dtype(source, name).itemsize
    stored = Path(name_of_model).stat().st_size if Path(name_of_model).is_file() else source.nbytes()
    quantized = sum(layer.nbytes for layer in chosen)
    return Sizes(parameters, sum(x.n * x.k for x in chosen), stored, kept + quantized, quantized)


def _blocks(layers: Iterable[LayerPlan]) -> dict[str, list[LayerPlan]]:
    """Layers by the decoder block they belong to: the path up to its first number."""
    found: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        parts = layer.path.split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        found.setdefault(".".join(parts[: index + 1]), []).append(layer)
    return found


def _inputs(layers: list[LayerPlan]) -> list[int]:
    """Width of each distinct input tensor among `layers`: q, k and v share one, and so do gate and up."""
    seen: set[tuple[str, str]] = set()
    widths = []
    for layer in layers:
        parent, _, leaf = layer.path.rpartition(".")
        group = next((min(names) for names in _SHARED_INPUT if leaf in names), leaf)
        if (parent, group) not in seen:
            seen.add((parent, group))
            widths.append(layer.k)
    return widths


def _peak_memory(layers: tuple[LayerPlan, ...], source: ModelSource, tokens: int, compared: bool) -> int:
    """Bytes: the process, one block in float32 twice (as it is and quantized), its Hessians (float32, and the float64
    factor of the largest), the activations of every calibration token before and after the block, and the largest
    other tensor, as the embedding is read whole. compared: with the float model, of which there are a block,
    activations and statistics then."""
    blocks = _blocks(layer for layer in layers if layer.format)
    block = max((sum(x.n * x.k for x in members) for members in blocks.values()), default=0)
    widths = max((_inputs(members) for members in blocks.values()), key=lambda w: sum(k * k for k in w), default=[])
    hessians = 4 * sum(k * k for k in widths) + 3 * 8 * max((k * k for k in widths), default=0)
    hidden = min(widths, default=0)
    largest = max((4 * math.prod(source.shape(name)) for name in source.names()), default=0)
    calibration = hessians + 8 * tokens * hidden if tokens else 0
    twin = 4 * block + calibration if compared else 0
    return int(_PROCESS_BYTES + 8 * block + calibration + twin + largest)


def _finetune_memory(chosen: list[LayerPlan], scheme: Scheme, tokens: int) -> int:
    """Bytes: the whole model in float32 as teacher, the codes' levels, and the student's dense weights."""
    return 12 * sum(x.n * x.k for x in chosen) if scheme.finetune and tokens else 0


def _training(scheme: Scheme, tokens: int, weights: int) -> float:
    """Operations of tuning (forward and backward per pass, a second stream) and of fine-tuning (with a teacher)."""
    tune = (6 * scheme.tune.epochs + 4) if scheme.tune else 0
    finetune = 8 * scheme.finetune.epochs if scheme.finetune else 0
    return float((tune + finetune) * tokens * weights)


def _seconds(
    chosen: list[LayerPlan], tokens: int, sequential: bool, scheme: Scheme, method: Method, seen: int
) -> tuple[float, float, float]:
    """(low, likely, high): forward passes, Hessians, factorisations and training at this machine's matmul rate.

    seen: tokens that are looked at before that, to prepare activations.
    """
    weights = sum(x.n * x.k for x in chosen)
    work = (_ROUNDING + 2 * seen) * weights
    searched = sum(_search_seconds(parse_format(str(x.format))) * x.n * x.k for x in chosen)
    columns = 0.0
    if tokens:
        widths = [k for members in _blocks(chosen).values() for k in _inputs(members)]
        calibration = 2 * tokens * weights * (2 if sequential else 1) + 2 * tokens * sum(k * k for k in widths)
        compared = asymmetric(method)  # with the float block: everything twice
        work += calibration * (2 if compared else 1) + (3 * sum(k**3 for k in widths) if compared else 0)
        efforts = [METHODS[scheme.method].effort(parse_format(str(x.format))) for x in chosen]
        own = [_PER_WEIGHT * x.n * x.k + _PER_PAIR * x.k**2 for x in chosen]
        work += sum(e * w + 4 * x.k**3 for e, w, x in zip(efforts, own, chosen, strict=True))
        work += _training(scheme, tokens, weights)
        columns = sum(e * x.k for e, x in zip(efforts, chosen, strict=True))
    likely = _LOAD_SECONDS + searched + work / _flops_per_second() + columns * _COLUMN_SECONDS
    return (likely * _RANGE[0], likely, likely * _RANGE[1])


def _search_seconds(fmt: WeightFormat) -> float:
    """Seconds of a weight's share in the search for scales or codes, where it is more than rounding: of sums of signs,
    and of trellises, whose paths are searched six times."""
    if not isinstance(fmt, Format):
        return 0.0
    if fmt.element.window > 1:
        return 6e-6
    return 1e-7 * 2**fmt.terms if fmt.terms > 1 else 0.0


def _flops_per_second(size: int = 768) -> float:
    """float32 matmul rate of this machine, from a few milliseconds of measurement."""
    a = torch.ones(size, size)
    best = math.inf
    for _ in range(4):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / max(best, 1e-9)


def runs_on(
    fmt: WeightFormat, n: int = 4096, k: int = 4096, target: Target | None = None, activation: str = ""
) -> dict[str, str | None]:
    """Backend name -> None when it can run `fmt` for an [n, k] weight, with inputs rounded to `activation`, else why
    not. Backends that serve this machine are asked about it; others about a GPU of their kind (sm_90).
    """
    host = target or host_target()
    found: dict[str, str | None] = {}
    if isinstance(fmt, ChoiceFormat):
        for candidate in fmt.candidates:
            found |= {name: found.get(name) or why for name, why in runs_on(candidate, n, k, host, activation).items()}
        return found
    for name in BACKENDS:
        try:
            backend = load_backend(name)
        except ImportError as e:
            found[name] = f"cannot be imported: {e}"
            continue
        device = host if host.kind in backend.kinds else Target("cuda", "sm_90")
        words = sixteen_bit_products(fmt)
        compute = "int16" if device.kind == "cpu" and words and device.arch != "generic" else "float"
        layout = LAYOUTS[backend.layout_of(fmt, device)]
        if activation:
            compute = rounded_products(fmt, k, layout, parse_activation(activation))
        spec = KernelSpec((n,), k, str(fmt), str(layout), compute, activation=activation)  # type: ignore[arg-type]
        if device.kind == "cuda":  # where models have activations of 16 bits
            spec = spec.typed("bf16")
        found[name] = backend.supports(spec, device)
    return found


def _runs(chosen: list[LayerPlan]) -> dict[str, str | None]:
    """Backend -> None when it runs every layer, else how many it cannot and the first reason."""
    shapes: dict[tuple[str, int, int, str], int] = {}
    for layer in chosen:
        key = (str(layer.format), layer.n, layer.k, layer.activation)
        shapes[key] = shapes.get(key, 0) + 1
    refused: dict[str, list[tuple[int, str]]] = {name: [] for name in BACKENDS}
    for (text, n, k, activation), count in shapes.items():
        for name, why in runs_on(parse_format(text), n, k, None, activation).items():
            if why is not None:
                refused[name].append((count, why))
    host = host_target()
    return {name: _refusal(name, reasons, host) for name, reasons in refused.items()}


def _refusal(name: str, reasons: list[tuple[int, str]], host: Target) -> str | None:
    if reasons:
        return f"cannot run {sum(c for c, _ in reasons)} layers: {reasons[0][1]}"
    try:
        backend = load_backend(name)
    except ImportError as e:
        return str(e)
    return backend.available(host) if host.kind in backend.kinds else None


def _untied_note(path: str) -> str:
    return f"{path} shares the embedding table, and becomes a tensor of its own when the model is rotated"


def _notes(layers: tuple[LayerPlan, ...], chosen: list[LayerPlan]) -> Iterable[str]:
    kept = [layer.path for layer in layers if not layer.format]
    if kept:
        shown = ", ".join(kept[:3]) + (" ..." if len(kept) > 3 else "")
        yield f"{_count(len(kept), 'linear layer')} kept as stored: {shown}"
    ragged = [x for x in chosen if _ragged(parse_format(str(x.format)), x.k)]
    if ragged:
        yield f"{_count(len(ragged), 'layer')} with a shorter last group, as the group size does not divide the width"
    narrow = [x for x in chosen if x.k % 128 or x.n % 64]
    if narrow:
        yield f"{_count(len(narrow), 'layer')} not a multiple of 128 x 64: vLLM's fastest kernel (Marlin) skips them"


def _ragged(fmt: WeightFormat, k: int) -> bool:
    return isinstance(fmt, Format) and fmt.granularity.kind == "g" and k % fmt.granularity.group > 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
