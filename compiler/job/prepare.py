"""Before quantization: rewrite the float model, and settle what every layer does with its inputs.

Everything found out from calibration is a few vectors, *decisions*, which a run keeps in its journal; what follows from
them (edits of tensors, formats, orders) is computed again, so an interrupted run goes on with the same model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowbit.compiler.errors import RunError
from lowbit.compiler.frontend.structure import model_structure
from lowbit.compiler.io import native
from lowbit.compiler.io.rewritten import RewrittenSource, rewrite_module
from lowbit.compiler.io.source import ModelSource
from lowbit.compiler.ir.sites import Site, Structure
from lowbit.compiler.job.journal import Journal
from lowbit.compiler.job.layers import ProgressSink, Selection
from lowbit.compiler.job.observe import observe_model, observe_source
from lowbit.compiler.runtime.modules import check_activation
from lowbit.quantizers.formats import ActivationFormat, ChoiceFormat, Format, IntElement, WeightFormat
from lowbit.quantizers.inputs import LayerInput, static_scales, wide_share
from lowbit.quantizers.methods import Fmpq, Method
from lowbit.quantizers.methods.fmpq import group_gains
from lowbit.quantizers.observe import SiteStats
from lowbit.quantizers.rewrites import Decisions, Edits, Outcome, Permute, Rewrite, Scene, rewrite_text
from lowbit.quantizers.scheme import Scheme

__all__ = [
    "Host",
    "ModuleHost",
    "Preparation",
    "Prepared",
    "SourceHost",
    "calibrates",
    "check_inputs",
    "ordered",
    "prepare_model",
    "prepare_source",
    "stored_inputs",
]


class Host(ABC):
    """The float model that is prepared: it can be read, changed and watched."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """A tensor as it is now."""

    @abstractmethod
    def apply(self, edits: Edits) -> None:
        """Change tensors."""

    @abstractmethod
    def observe(self, readers: Sequence[str], inputs: Mapping[str, LayerInput], costs: bool) -> dict[str, SiteStats]:
        """What layers read, as the model is now; `costs` of their columns' errors too."""


@dataclass
class SourceHost(Host):
    """A checkpoint, read lazily."""

    source: ModelSource
    tokens: Tensor | None
    sink: ProgressSink
    folder: Path

    def tensor(self, name: str) -> Tensor:
        return self.source.tensor(name)

    def apply(self, edits: Edits) -> None:
        self.source = RewrittenSource(self.source, edits)

    def observe(self, readers: Sequence[str], inputs: Mapping[str, LayerInput], costs: bool) -> dict[str, SiteStats]:
        assert self.tokens is not None
        return observe_source(self.source, self.tokens, readers, inputs, self.sink, self.folder, costs)


@dataclass
class ModuleHost(Host):
    """A model in memory, which is changed."""

    model: nn.Module
    tokens: Tensor | None
    edits: list[Edits] = field(default_factory=list)

    def tensor(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach().cpu()

    def apply(self, edits: Edits) -> None:
        rewrite_module(self.model, edits)
        self.edits.append(edits)

    def observe(self, readers: Sequence[str], inputs: Mapping[str, LayerInput], costs: bool) -> dict[str, SiteStats]:
        assert self.tokens is not None
        return observe_model(self.model, self.tokens, readers, inputs, costs)


@dataclass(frozen=True)
class Prepared:
    """inputs: by path, what quantized layers do with their inputs. decisions: what to remember. notes: what was left
    alone, and why. share: of the input channels that are rounded to 8 bits or more, None where none are rounded."""

    inputs: Mapping[str, LayerInput] = field(default_factory=dict)
    decisions: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    share: float | None = None


def calibrates(scheme: Scheme, method: Method, paths: Sequence[str]) -> bool:
    """Whether preparing takes calibration data."""
    static = any((fmt := scheme.activation_for(p)) is not None and fmt.static for p in paths)
    return static or isinstance(method, Fmpq) or any(r.observes for r in scheme.rewrites)


def check_inputs(
    scheme: Scheme, method: Method, formats: Mapping[str, WeightFormat], shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse what would fail late.

    Raises FormatError (LB0243) for activation formats that do not fit their weights, RunError (LB0516) for rewrites
    and methods that have no activations to serve.
    """
    rounded = {p: fmt for p in formats if (fmt := scheme.activation_for(p)) is not None}
    for path, fmt in rounded.items():
        for weight in _alternatives(formats[path]):
            check_activation(weight, *shapes[path], str(fmt))
    if isinstance(method, Fmpq) and not any(_mixable(fmt) for fmt in rounded.values()):
        raise RunError(
            "LB0516", "fmpq divides activations of fewer than 8 bits into groups, and there are none",
            hint="set activation = 'int4.g64', or use gptq",
        )  # fmt: skip
    if isinstance(method, Fmpq) and _outliers(scheme) is not None:
        raise RunError(
            "LB0516", "fmpq and a threshold of outliers both say how many groups are wide",
            hint="leave outliers out of permute, or use gptq",
        )  # fmt: skip
    if not rounded and (useless := next((r for r in scheme.rewrites if not r.serves_weights), None)):
        named = rewrite_text(useless)
        raise RunError("LB0516", f"{named} serves rounded activations, and there are none", hint="set `activation`")


def _alternatives(fmt: WeightFormat) -> Sequence[WeightFormat]:
    return fmt.candidates if isinstance(fmt, ChoiceFormat) else (fmt,)


def _mixable(fmt: ActivationFormat | None) -> bool:
    """Whether some of a format's groups can have 8 bits instead."""
    return fmt is not None and isinstance(fmt.element, IntElement) and 0 < fmt.group and fmt.element.bits < 8


def _outliers(scheme: Scheme) -> Permute | None:
    """The permutation that says which channels are wide, if there is one."""
    return next((r for r in scheme.rewrites if isinstance(r, Permute) and r.outliers), None)


@dataclass
class Preparation:
    """One model being prepared. formats, shapes: of the layers that will be quantized, by path."""

    host: Host
    structure: Structure
    scheme: Scheme
    method: Method
    formats: Mapping[str, WeightFormat]
    shapes: Mapping[str, tuple[int, int]]

    def run(self, remembered: Mapping[str, Tensor] | None = None) -> Prepared:
        """Rewrite the host's model and settle inputs. remembered: the decisions of an earlier, interrupted run."""
        self._memory, self._decided = remembered, Decisions()
        self._orders: dict[str, Tensor] = {}
        self._online: dict[str, int] = {}
        self._stats: dict[str, SiteStats] = {}
        notes: list[str] = []
        for rewrite in self.scheme.rewrites:
            decided = self._recall(rewrite.name)
            if decided is None:
                self._stats = self._observe(rewrite) if rewrite.observes else {}
                decided = self._remember(rewrite.name, rewrite.decide(self._scene(self._stats)))
            outcome = rewrite.outcome(self._scene({}), decided)
            self._adopt(outcome)
            notes += outcome.declined
        inputs = self._inputs()
        share = wide_share(inputs, {p: k for p, (_, k) in self.shapes.items()})
        rounded = any(what.format is not None for what in inputs.values())
        return Prepared(inputs, self._decided, tuple(notes), share if rounded else None)

    def _scene(self, stats: Mapping[str, SiteStats]) -> Scene:
        return Scene(self.structure, self.host.tensor, self._format, self.formats.get, stats, self._online)

    def _format(self, path: str) -> ActivationFormat | None:
        return self.scheme.activation_for(path) if path in self.formats else None

    def _observe(self, rewrite: Rewrite | None = None) -> dict[str, SiteStats]:
        """For a rewrite, or for what is settled after all of them."""
        scene = self._scene({})
        weights = rewrite is not None and rewrite.serves_weights
        sites = scene.quantized_sites() if weights else scene.rounded_sites()
        online = {p: LayerInput(rotation=n) for p, n in self._online.items()}
        return self.host.observe([s.name for s in sites], online, weights and self.method.needs_hessian)

    def _adopt(self, outcome: Outcome) -> None:
        if outcome.edits:
            self.host.apply(outcome.edits)
            gathered = {
                name: s.gathered(outcome.folded[name]) for name, s in self._stats.items() if name in outcome.folded
            }
            # Statistics outlive a permutation, but not a change of values.
            self._stats = {**self._stats, **gathered} if outcome.folded else {}
        self._orders.update(outcome.orders)
        self._online.update(outcome.online)

    def _recall(self, prefix: str) -> Decisions | None:
        if self._memory is None:
            return None
        found = {k.removeprefix(f"{prefix} "): v for k, v in self._memory.items() if k.startswith(f"{prefix} ")}
        return self._remember(prefix, found)

    def _remember(self, prefix: str, decided: Decisions) -> Decisions:
        self._decided.update({f"{prefix} {name}": value.contiguous() for name, value in decided.items()})
        return decided

    def _inputs(self) -> dict[str, LayerInput]:
        """What every quantized layer does with its inputs."""
        sites = self._scene({}).rounded_sites()
        wide = self._widths(sites)
        scales = self._scales(sites, wide)
        by_path = {p: site for site in sites for p in site.consumers}
        found: dict[str, LayerInput] = {}
        same: dict[tuple[str, ActivationFormat | None], LayerInput] = {}
        for path in self.formats:
            fmt, site = self._format(path), by_path.get(path)
            if site is not None and fmt is not None and site.name in wide:
                fmt = self._widened(fmt, wide[site.name])
            if fmt is not None and fmt.static and (site is None or site.name not in scales):
                raise RunError("LB0517", "no calibration token reached it, and its scales are static", where=path)
            static = scales[site.name] if site is not None and fmt is not None and fmt.static else None
            what = LayerInput(fmt, self._orders.get(path), static, self._online.get(path, 0))
            if site is not None:  # one object for layers that read one tensor alike, so that it is rounded once
                what = same.setdefault((site.name, fmt), what)
            if what.format is not None or what.order is not None or what.rotation:
                found[path] = what
        return found

    def _widths(self, sites: Sequence[Site]) -> Decisions:
        """int64 [] by site: groups of 8 bits, where the method chooses them."""
        method, outliers = self.method, _outliers(self.scheme)
        if not isinstance(method, Fmpq) and outliers is None:
            return {}
        remembered = self._recall("wide")
        if remembered is not None:
            return remembered
        if outliers is not None:
            formats = {s.name: f for s in sites if (f := self._site_format(s)) is not None and f.integer}
            counts = {
                s.name: outliers.wide(st, formats[s.name]) for s, st in self._measured(sites) if s.name in formats
            }
            return self._remember("wide", {name: torch.tensor(count) for name, count in counts.items()})
        assert isinstance(method, Fmpq)
        gains: dict[str, Tensor] = {}
        formats = {}
        for site, stats in self._measured(sites):
            fmt = self._site_format(site)
            if fmt is None or not _mixable(fmt):
                continue
            formats[site.name], gains[site.name] = fmt, torch.zeros(fmt.groups(site.width))
            if method.budget == "greedy":
                weights = [self.host.tensor(self.structure.weights[p]).float() for p in site.consumers]
                order = self._orders.get(site.name)
                weights = weights if order is None else [w[:, order] for w in weights]
                gains[site.name] = group_gains(stats, fmt, weights)
        chosen = method.widths(gains, formats)
        return self._remember("wide", {name: torch.tensor(count) for name, count in chosen.items()})

    def _widened(self, fmt: ActivationFormat, count: Tensor) -> ActivationFormat:
        """`fmt` with so many wide groups, where it can have any."""
        possible = fmt.integer if _outliers(self.scheme) is not None else _mixable(fmt)
        return replace(fmt, wide=int(count)) if possible else fmt

    def _site_format(self, site: Site) -> ActivationFormat | None:
        return next((f for p in site.consumers if (f := self._format(p)) is not None), None)

    def _scales(self, sites: Sequence[Site], wide: Decisions) -> Decisions:
        """float32 [groups] by site, for static formats."""
        static = {s.name: f for s in sites if (f := self._site_format(s)) is not None and f.static}
        if not static:
            return {}
        remembered = self._recall("scale")
        if remembered is not None:
            return remembered
        found = {}
        for site, stats in self._measured([s for s in sites if s.name in static]):
            fmt = static[site.name]
            fmt = self._widened(fmt, wide[site.name]) if site.name in wide else fmt
            found[site.name] = static_scales(stats, fmt)
        return self._remember("scale", found)

    def _measured(self, sites: Sequence[Site]) -> list[tuple[Site, SiteStats]]:
        """Sites with statistics, channels in the order in which they are rounded."""
        if not self._stats:
            self._stats = self._observe()
        measured = [(site, self._stats[site.name]) for site in sites if site.name in self._stats]
        orders = self._orders
        return [(s, st.gathered(orders[s.name]) if s.name in orders else st) for s, st in measured]


def prepare_source(
    host: SourceHost, network: nn.Module, selection: Selection, scheme: Scheme, method: Method, journal: Journal
) -> Prepared:
    """Prepare a checkpoint, with the decisions in the journal when it has them, and in it afterwards.

    Raises IRError (LB0320) when the model cannot be traced and something has to be known about its structure.
    """
    if not _changes(scheme, selection):
        return Prepared()
    needed = scheme.rewrites or calibrates(scheme, method, list(selection.formats))
    structure = model_structure(network) if needed else Structure((), None, "")
    preparation = Preparation(host, structure, scheme, method, selection.formats, selection.shapes)
    records = journal.events("decided")
    if records:
        return preparation.run(load_file(journal.verified(records[0])))
    prepared = preparation.run()
    if prepared.decisions:
        digest = journal.store("decided.safetensors", lambda path: save_file(dict(prepared.decisions), path))
        journal.append({"event": "decided", "file": "decided.safetensors", "sha256": digest})
    return prepared


def prepare_model(
    model: nn.Module, tokens: Tensor | None, selection: Selection, scheme: Scheme, method: Method
) -> tuple[Prepared, list[Edits]]:
    """Prepare a model in memory, which is changed; also gives the changes, to make them elsewhere too."""
    if not _changes(scheme, selection):
        return Prepared(), []
    needed = scheme.rewrites or calibrates(scheme, method, list(selection.formats))
    structure = model_structure(model) if needed else Structure((), None, "")
    host = ModuleHost(model, tokens)
    prepared = Preparation(host, structure, scheme, method, selection.formats, selection.shapes).run()
    return prepared, host.edits


def _changes(scheme: Scheme, selection: Selection) -> bool:
    """Whether there is anything to prepare."""
    return bool(scheme.rewrites) or any(scheme.activation_for(p) for p in selection.formats)


def stored_inputs(inputs: Mapping[str, LayerInput]) -> dict[str, native.StoredInput]:
    """What checkpoints say about inputs; the order is the matrix's own."""
    return {p: native.StoredInput(str(w.format or ""), w.rotation, w.scales) for p, w in inputs.items()}


def ordered(fmt: WeightFormat, what: LayerInput | None) -> WeightFormat:
    """The format a layer's matrix is stored in, given what it does with its inputs."""
    if what is None or what.order is None or not isinstance(fmt, Format):
        return fmt
    return replace(fmt, ordered=True)
