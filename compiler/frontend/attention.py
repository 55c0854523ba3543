"""Attention with shared key and value heads, in FX graphs, without copies of what is shared.

Models with fewer key and value heads than query heads repeat them before `scaled_dot_product_attention`; Inductor
writes the copies to memory, for all keys, at every step. Queries that share a head can as well stand below each other,
as more rows of it: the same products, and for a short step only its few rows of queries are moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from lowbit.compiler.frontend.fx import value_of, written_by

__all__ = [
    "before_repeats",
    "given_arguments",
    "rewrite_calls",
    "shape_of",
    "share_heads",
    "written_since",
]

_ATTENTION = torch.nn.functional.scaled_dot_product_attention
_MASK, _DROPOUT, _CAUSAL, _SCALE, _GROUPED = "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"
_ARGUMENTS = ("query", "key", "value", _MASK, _DROPOUT, _CAUSAL, _SCALE, _GROUPED)
_RESHAPES = ("reshape", "view", "flatten", "contiguous")


def share_heads(gm: fx.GraphModule) -> int:
    """Let all attention with repeated keys and values read them once, where queries are fewer; how many there were."""
    return rewrite_calls(gm, _share)


def rewrite_calls(gm: fx.GraphModule, rewrite: Callable[[fx.Graph, fx.Node], bool]) -> int:
    """Rewrite calls of attention in place; `rewrite` says of each whether it did. How many there were."""
    calls = [node for node in gm.graph.nodes if node.op == "call_function" and node.target is _ATTENTION]
    if count := sum(rewrite(gm.graph, node) for node in calls):
        gm.graph.eliminate_dead_code(_is_impure)
        gm.graph.lint()
        gm.recompile()
    return count


def _share(graph: fx.Graph, node: fx.Node) -> bool:
    """Rewrite one call: queries [B, heads, T, D] become [B, shared, repeats x T, D]."""
    given = given_arguments(node)
    query, key, value = (given[name] for name in _ARGUMENTS[:3])
    if given.get(_DROPOUT) or given.get(_CAUSAL):
        return False  # a causal mask is by row, and rows would no longer be tokens
    if not given.get(_GROUPED):
        if written_since(key, node) or written_since(value, node):
            return False
        key, value = before_repeats(key), before_repeats(value)
    # The result has the queries' heads and rows, and always a known shape; what our passes made of queries has none.
    if not all(len(shape_of(n)) == 4 for n in (node, key, value)):
        return False
    (_, heads, tokens, _), (_, shared, keys, _) = shape_of(node), shape_of(key)
    if shape_of(value)[1] != shared or not _worth_it(heads, shared, tokens, keys):
        return False
    mask, repeats = given.get(_MASK), heads // shared
    if mask is not None and (len(shape_of(mask)) != 4 or shape_of(mask)[1] != 1):
        return False
    with graph.inserting_before(node):
        rows = graph.call_method("flatten", (graph.call_method("unflatten", (query, 1, (shared, repeats))), 2, 3))
        if mask is not None:
            # One row of a mask may stand for all tokens.
            wide = graph.call_method("expand", (graph.call_method("unsqueeze", (mask, 2)), -1, -1, repeats, tokens, -1))
            mask = graph.call_method("flatten", (wide, 2, 3))
        out = graph.call_function(_ATTENTION, (rows, key, value), {_MASK: mask, _SCALE: given.get(_SCALE)})
        back = graph.call_method("flatten", (graph.call_method("unflatten", (out, 2, (repeats, tokens))), 1, 2))
    back.meta = dict(node.meta)
    node.replace_all_uses_with(back)
    graph.erase_node(node)
    return True


def given_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call of attention, by name."""
    return {**dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}


def _worth_it(heads: Any, shared: Any, tokens: Any, keys: Any) -> bool:
    """True where heads are shared and a step has fewer tokens than there are keys, as far as the graph knows."""
    if not (isinstance(heads, int) and isinstance(shared, int) and isinstance(tokens, int)):
        return False
    return heads > shared > 0 and heads % shared == 0 and (tokens < keys if isinstance(keys, int) else tokens == 1)


def written_since(copy: Any, node: fx.Node) -> bool:
    """True where anything is written to in place between a copy and the call `node`: the copy might be needed."""
    step = node.prev
    while step is not copy and step.op != "root":
        if written_by(step):
            return True
        step = step.prev
    return False


def before_repeats(node: Any) -> Any:
    """What `node` [B, shared x repeats, S, D] repeats: [B, shared, S, D], or None."""
    whole = shape_of(node)
    while isinstance(node, fx.Node) and node.op == "call_method" and node.target in _RESHAPES:
        node = node.args[0]
    if not (isinstance(node, fx.Node) and node.target == "expand" and len(shape_of(node)) == 5):
        return None
    inner = node.args[0]
    fits = isinstance(inner, fx.Node) and len(shape_of(inner)) == 5 and shape_of(inner)[2] == 1
    source = inner.args[0] if fits and inner.args else None  # type: ignore[union-attr]
    if not isinstance(source, fx.Node) or len(shape_of(source)) != 4:
        return None
    before, after = shape_of(source), shape_of(node)
    merged = len(whole) == 4 and (whole[1], whole[3]) == (after[1] * after[2], after[4])
    return source if merged and (before[1], before[3]) == (after[1], after[4]) else None


def shape_of(node: Any) -> tuple[Any, ...]:
    """The shape of a node's tensor, as far as the graph knows it; empty where it does not."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _is_impure(node: fx.Node) -> bool:
    """Everything but what a repeat is made of: other calls may write to their arguments."""
    return not (node.op == "call_method" and node.target in (*_RESHAPES, "expand")) and not _is_index(node)


def _is_index(node: fx.Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"
