"""Which tensors of a model belong together: the sites and the residual stream of its graph, with the modules' help.

What a graph cannot show is read off the modules: whether a norm multiplies by its weight or by one plus its weight is
found by running the norm with two weights.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowbit.compiler.frontend.trace import import_model
from lowbit.compiler.ir.sites import Norm, Site, Stream, Structure, find_sites
from lowbit.compiler.pipeline import run_pipeline
from lowbit.passes.canonicalize import Canonicalize

__all__ = ["model_structure"]


def model_structure(model: nn.Module) -> Structure:
    """Sites and stream of `model` (parameters may be on meta); raises IRError (LB0320) when it cannot be traced."""
    graph = import_model(model)
    run_pipeline(graph, [Canonicalize()])
    found = find_sites(graph)
    sites = tuple(_completed(model, site) for site in found.sites)
    norms = {s.producer.path: s.producer for s in sites if isinstance(s.producer, Norm)}
    stream, problem = found.stream, found.problem
    if stream is not None:
        unknown = [n.path for n in stream.norms if n.path not in norms]
        if unknown:
            stream, problem = None, f"the norm {unknown[0]} is not understood"
        else:
            stream = Stream(stream.width, stream.tables, tuple(norms[n.path] for n in stream.norms), stream.writers)
    return replace(found, sites=sites, stream=stream, problem=problem)


def _completed(model: nn.Module, site: Site) -> Site:
    """The site with its norm's offset."""
    if not isinstance(norm := site.producer, Norm):
        return site
    offset = _offset(model.get_submodule(norm.path), site.width)
    if offset is None:
        return replace(site, producer=None, problem=f"{norm.path} is not a weight times a normalised input")
    return replace(site, producer=replace(norm, offset=offset))


@torch.no_grad()
def _offset(norm: nn.Module, width: int) -> float | None:
    """c where the norm computes (c + weight) * normalised x (+ bias): 0 or 1; None when it computes something else."""
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    zero, one, two = (_run(norm, x, value) for value in (0.0, 1.0, 2.0))
    if not torch.allclose(two - one, one - zero, rtol=1e-4, atol=1e-5):
        return None
    for offset in (0.0, 1.0):
        if torch.allclose(zero, offset * (one - zero), rtol=1e-4, atol=1e-5):
            return offset
    return None


def _run(norm: nn.Module, x: Tensor, weight: float) -> Tensor:
    clone = copy.deepcopy(norm)
    for name, p in list(clone.named_parameters(recurse=False)):
        value = weight if name == "weight" else 0.0
        clone._parameters[name] = nn.Parameter(torch.full(p.shape, value), requires_grad=False)
    out: Tensor = clone(x)
    return out
