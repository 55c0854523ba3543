"""Attention of a single token in FX graphs becomes one operator, `lowbit::attend_rows`.

torch's attention for CPUs is made for many queries, reads all that a cache was allocated for, and takes copies of keys
and values that heads share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from lowbit.compiler.frontend.attention import (
    before_repeats,
    given_arguments,
    rewrite_calls,
    shape_of,
    written_since,
)
from lowbit.compiler.frontend.fx import value_of
from lowbit.compiler.runtime.plain_attend import attends

__all__ = ["attend_steps"]


def attend_steps(gm: fx.GraphModule) -> int:
    """Replace what the operator's kernel does, in place; how many calls there were."""
    return rewrite_calls(gm, _replace)


def _replace(graph: fx.Graph, node: fx.Node) -> bool:
    given = given_arguments(node)
    query, key, value = (given[name] for name in ("query", "key", "value"))
    mask, scale = given.get("attn_mask"), given.get("scale")
    if given.get("dropout_p") or given.get("is_causal"):
        return False  # of one query, torch's causal mask leaves the first key alone
    if not given.get("enable_gqa") and not written_since(key, node) and not written_since(value, node):
        key, value = before_repeats(key) or key, before_repeats(value) or value
    # The result has the queries' shape, and always a known one; what our passes made of queries has none.
    if not _fits(node, key, value, mask):
        return False
    scale = shape_of(key)[3] ** -0.5 if scale is None else scale
    with graph.inserting_before(node):
        out = graph.call_function(torch.ops.lowbit.attend_rows.default, (query, key, value, mask, scale))
    out.meta = dict(node.meta)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    return True


def _fits(result: Any, key: Any, value: Any, mask: Any) -> bool:
    """One query of every head, keys and values of a type the kernel reads, and a mask that only says yes or no."""
    q, k, v = (shape_of(x) for x in (result, key, value))
    if not len(q) == len(k) == len(v) == 4 or not all(isinstance(n, int) for n in (*q[1:], k[1], v[1], k[3], v[3])):
        return False  # comparing a size that is not known would tie the graph to the answer
    if q[2] != 1 or q[1] % k[1] or v[1] != k[1] or not q[3] == k[3] == v[3]:
        return False
    if mask is not None and (len(shape_of(mask)) != 4 or shape_of(mask)[1] != 1 or _dtype(mask) != torch.bool):
        return False
    return _dtype(key) == _dtype(value) and attends(q[3], _dtype(key))


def _dtype(node: fx.Node) -> torch.dtype:
    found: torch.dtype = value_of(node).dtype
    return found
