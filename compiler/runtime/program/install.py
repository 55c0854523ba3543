"""`lowbit.compile(model, mode="program")`: the program takes the place of the model's own forward."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lowbit.codegen.select import say_once
from lowbit.compiler.errors import RunError
from lowbit.compiler.runtime.embedding import quantize_embedding, quantize_head
from lowbit.compiler.runtime.program.cache import ProgramCache
from lowbit.compiler.runtime.program.engine import DecoderProgram
from lowbit.compiler.runtime.program.mixture import pair_experts
from lowbit.compiler.runtime.program.parts import activation_of, read_decoder
from lowbit.compiler.runtime.program.verify import verify_program

__all__ = ["check_program", "compile_program", "why_modules"]

_log = logging.getLogger("lowbit")
_IGNORED = {"return_dict", "output_attentions", "output_hidden_states", "cache_position", "use_cache"}


def compile_program(
    model: nn.Module,
    *,
    max_tokens: int = 512,
    context: int | None = None,
    head: str | None = None,
    embedding: str | None = None,
    cache: str | None = None,
    threads: int | None = None,
) -> nn.Module:
    """Build the program of a fused model, compare it with the model, and let `forward` and `generate` use it.

    cache: of keys and values, `f16`, `f32` or a format such as `kv4`; the one of the model's scheme when None. With a
    format, prompts attend to their own keys and values unquantized, as with `QuantizedCache`; a prompt longer than
    `max_tokens` is several. context: positions a sequence may have; the model's own limit, at most 4096, when None.
    head: a format for a dense output layer (`int8.ch.sym`), which for small models is most of what a token reads.
    embedding: the same for the embedding table and an output layer tied to it, which then share their bytes.
    `model.lowbit_program` is the program. Raises RunError LB0565 when program and model disagree; `check_program`
    refuses the rest beforehand.
    """
    if embedding is not None:
        quantize_embedding(model, embedding)
    if head is not None:
        quantize_head(model, head)
    config = getattr(model, "config", None)
    if config is not None and activation_of(config) == "silu":
        pair_experts(model)
    limit = int(getattr(config, "max_position_embeddings", 4096) or 4096)
    parts = read_decoder(model, context or min(limit, 4096), _cache_of(model, cache))
    program = DecoderProgram(parts, max_tokens=max_tokens, context=parts.rope.shape[0], threads=threads)
    error = verify_program(program, model)
    _log.info("program verified: logits differ by %.1e", error)
    install(model, program)
    return model


def check_program(model: nn.Module, **options: Any) -> None:
    """Refuse what has no program, without changing the model: RunError LB0560 for a part it does not know, LB0566 in
    training mode, LB0568 for an option there is not; KernelError LB0430 for sizes or a cache type."""
    known = ("context", "head", "embedding", "cache", "threads")
    if unknown := sorted(set(options) - set(known)):
        raise RunError("LB0568", f"mode 'program' has no option {unknown[0]!r}", hint=f"use {', '.join(known)}")
    for name in ("context", "threads"):
        if (value := options.get(name)) is not None and value < 1:
            raise RunError("LB0568", f"{name}={value} is not positive", hint="use at least 1, or leave it out")
    if model.training:
        raise RunError("LB0566", "the model is in training mode", hint="call model.eval() first")
    read_decoder(model, 16, _cache_of(model, options.get("cache")))


def _cache_of(model: nn.Module, cache: str | None) -> str:
    """What keys and values are kept in: what was asked for, else what the model was quantized for, else float16."""
    return cache or str(getattr(model, "kv_format", "")) or "f16"


def install(model: nn.Module, program: DecoderProgram) -> None:
    """Put `program` behind the model's `forward`, and its cache behind `generate`."""
    original, prepare = model.forward, getattr(model, "_prepare_cache_for_generation", None)
    if not hasattr(model, "lowbit_program"):
        model.register_load_state_dict_pre_hook(_refuse_weights)
    model.lowbit_program = program  # type: ignore[assignment]
    model.forward = functools.wraps(original)(functools.partial(_forward, model, program, original))
    if prepare is not None:
        prepare = functools.partial(_prepare, model, program, prepare)
        model._prepare_cache_for_generation = prepare  # type: ignore[assignment]


def _refuse_weights(model: nn.Module, *unused: Any) -> None:
    """The program has read norms, tables and dense matrices; new ones would reach only the model's modules."""
    raise RunError(
        "LB0579", "weights cannot be loaded into a model that runs as a native program", where=type(model).__name__,
        hint="load them first, and call lowbit.compile then",
    )  # fmt: skip


def _prepare(
    model: nn.Module, program: DecoderProgram, original: Callable[..., Any], config: Any, kwargs: dict[str, Any],
    mode: Any, batch: int, length: int,
) -> Any:  # fmt: skip
    """Give `generate` the program's cache where it would make a growing one for a single sequence, and every step can
    run in the program."""
    rows = batch * max(int(config.num_beams or 1), int(config.num_return_sequences or 1))
    plain = config.cache_implementation in (None, "dynamic") and config.use_cache is not False
    asked = {name: getattr(config, name, None) for name in ("output_attentions", "output_hidden_states")}
    given = {name: kwargs.get(name) for name in ("attention_mask", "inputs_embeds")}
    fits = why_modules(program, model, {"input_ids": torch.empty(1, 1, dtype=torch.int64), **given, **asked}) is None
    if rows == 1 and plain and fits and kwargs.get("past_key_values") is None and length <= program.context:
        kwargs["past_key_values"] = program.new_cache(length + 1)
        return None
    return original(config, kwargs, mode, batch, length)


def why_modules(program: DecoderProgram, model: nn.Module, call: dict[str, Any]) -> str | None:
    """Why a call cannot go to the program, or None."""
    ids, past, mask = call.get("input_ids"), call.get("past_key_values"), call.get("attention_mask")
    if ids is None or call.get("inputs_embeds") is not None:
        return "it gives embeddings instead of token ids"
    if ids.is_floating_point():
        return f"its token ids are {ids.dtype}"
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        return f"it has {tuple(ids.shape)} tokens, not one sequence"
    if past is not None and not isinstance(past, ProgramCache):
        return f"its cache is a {type(past).__name__}"
    start = 0 if past is None else past.length
    if past is None and start + ids.shape[1] > program.context:
        return f"it has more than {program.context} positions"
    if mask is not None and (mask.dim() != 2 or not bool(mask.all())):
        return "its attention mask hides tokens"
    if (at := call.get("position_ids")) is not None and not _counting(at, start, ids.shape[1]):
        return "its positions do not count up"
    for name in _INNER:
        if getattr(model.config, name, False) if call.get(name) is None else call[name]:
            return f"it asks for {name.removeprefix('output_').replace('_', ' ')}"
    if model.training or call.get("labels") is not None:
        return "it trains"
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        return "gradients are enabled (use torch.no_grad())"
    keep = call.get("logits_to_keep", 0)
    if not isinstance(keep, int):
        return "it selects logits by a tensor"
    extra = {k for k, v in call.items() if v is not None} - _IGNORED - _KNOWN
    return f"of its argument {min(extra)}" if extra else None


_INNER = ("output_router_logits", "output_attentions", "output_hidden_states")
_POSITIONAL = ("input_ids", "attention_mask", "position_ids", "past_key_values")
_KNOWN = {*_POSITIONAL, "inputs_embeds", "labels", "logits_to_keep", "output_router_logits"}


def _counting(at: torch.Tensor, start: int, count: int) -> bool:
    return at.numel() == count and bool((at.flatten() == torch.arange(start, start + count)).all())


def _forward(model: nn.Module, program: DecoderProgram, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model's forward: one step of the program, or the modules where the call needs them."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    call = {
        **dict(zip(("input_ids", "attention_mask", "position_ids", "past_key_values"), args, strict=False)),
        **kwargs,
    }
    past = call.get("past_key_values")
    if why := why_modules(program, model, call):
        if isinstance(past, ProgramCache):
            raise RunError("LB0563", f"the program's cache cannot serve this call: {why}", hint="give no cache")
        say_once(f"a call runs module by module, not as a program: {why}")
        return original(*args, **kwargs)
    ids = call["input_ids"][0]
    keeps_cache = past is not None or bool(call.get("use_cache", getattr(model.config, "use_cache", True)))
    held = past if past is not None else program.new_cache(ids.numel() + (64 if keeps_cache else 0))
    keep = min(int(call.get("logits_to_keep") or 0) or ids.numel(), ids.numel())
    logits = program.run(ids, held, keep)[None]
    out = CausalLMOutputWithPast(logits=logits, past_key_values=held if keeps_cache else None)
    whole = call.get("return_dict")
    return out if (getattr(model.config, "return_dict", True) if whole is None else whole) else out.to_tuple()
