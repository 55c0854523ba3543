"""The repeated blocks of a language model: finding them, calling one alone, and giving them weights for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.compiler.errors import RunError
from lowbit.quantizers.methods import check_finite

__all__ = [
    "BlockCall",
    "Blocks",
    "Trunk",
    "find_blocks",
    "linears_in",
    "materialize",
    "moved",
    "outside_modules",
    "release",
]


@dataclass(frozen=True)
class Blocks:
    """The decoder blocks of a model: `path` of the list that holds them, and the modules in order."""

    path: str
    modules: tuple[nn.Module, ...]

    def name(self, index: int) -> str:
        """Module path of one block."""
        return f"{self.path}.{index}"


def find_blocks(model: nn.Module) -> Blocks | None:
    """The longest list of modules of one class that hold linear layers, if there is one."""
    best: Blocks | None = None
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0 or len({type(m) for m in module}) != 1:
            continue
        if not any(isinstance(m, nn.Linear) for m in module[0].modules()):
            continue
        inside = best is not None and path.startswith(best.path + ".")
        if best is None or (len(module) > len(best.modules) and not inside):
            best = Blocks(path, tuple(module))
    return best


def linears_in(module: nn.Module, prefix: str) -> dict[str, nn.Linear]:
    """Linear layers below `module`, by full module path. Subclasses of nn.Linear are other layers, and left alone."""
    found = {}
    for name, child in module.named_modules():
        if type(child) is nn.Linear:
            found[f"{prefix}.{name}" if prefix and name else prefix or name] = child
    return found


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one block: the arguments after the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """Run the block on hidden states [batch, tokens, channels]."""
        out = block(hidden, *self.args, **self.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result


class _Stop(Exception):
    """Raised out of the model's forward pass."""


class Trunk:
    """The model around its blocks: what happens before the first and after the last.

    The blocks themselves are never run here; stand-ins record how they are called.
    """

    def __init__(self, model: nn.Module, blocks: Blocks) -> None:
        self.model, self.blocks = model, blocks
        self._tuple_output = False
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        weight = getattr(embedding, "weight", None)
        self._device = weight.device if isinstance(weight, Tensor) and weight.device.type != "meta" else "cpu"

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states [batch, tokens, channels] that enter the first block."""
        caught: list[Tensor] = []

        def stop(_index: int, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            caught.append(hidden.detach().cpu().float())
            raise _Stop

        self._forward(tokens, stop)
        return caught[0]

    def calls(self, tokens: Tensor) -> list[BlockCall]:
        """How each block is called on `tokens` [2 or more, length].

        Raises RunError (LB0506) when the arguments depend on the tokens, because one set of them is used for all.
        """
        first, second = (self._record(tokens[i : i + 1]) for i in (0, 1 % len(tokens)))
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            if not _same((a.args, a.kwargs), (b.args, b.kwargs)):
                raise RunError(
                    "LB0506",
                    "the block's arguments depend on the tokens, which calibration by blocks cannot follow",
                    where=self.blocks.name(index),
                )
        return first

    def _record(self, tokens: Tensor) -> list[BlockCall]:
        for self._tuple_output in (False, True):
            calls: list[BlockCall] = []
            shape: list[torch.Size] = []

            def note(index: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
                shape.append(hidden.shape)  # noqa: B023 - used up within the iteration
                if hidden.shape != shape[0]:  # noqa: B023
                    raise _Stop  # the model indexed into a tensor: it expects a tuple
                calls.append(BlockCall(moved(args), moved(_without_cache(kwargs))))  # noqa: B023
                if index + 1 == len(self.blocks.modules):
                    raise _Stop
                return (hidden,) if self._tuple_output else hidden

            self._forward(tokens, note)
            if len(calls) == len(self.blocks.modules):
                return calls
        raise RunError("LB0507", "the model does not call its blocks one after the other", where=self.blocks.path)

    def tail(self, tokens: Tensor, hidden: Tensor) -> None:
        """Run what follows the last block on `hidden` (after `calls`, which finds out what blocks return)."""

        def skip(index: int, states: Tensor, *_: Any, **__: Any) -> Any:
            out = hidden if index + 1 == len(self.blocks.modules) else states
            return (out,) if self._tuple_output else out

        self._forward(tokens, skip)

    def _forward(self, tokens: Tensor, stand_in: Callable[..., Any]) -> None:
        with _standing_in(self.blocks.modules, stand_in), torch.no_grad():
            try:
                self.model(input_ids=tokens.to(self._device), use_cache=False)
            except _Stop:
                return


@contextmanager
def _standing_in(blocks: tuple[nn.Module, ...], stand_in: Callable[..., Any]) -> Iterator[None]:
    """Calls of `blocks[i]` go to `stand_in(i, ...)`; everything else about them (their attributes) stays."""
    for index, block in enumerate(blocks):

        def forward(*args: Any, index: int = index, **kwargs: Any) -> Any:
            hidden, *rest = args if args else (kwargs.pop("hidden_states"),)
            return stand_in(index, hidden, *rest, **kwargs)

        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    caches = {"past_key_values", "past_key_value", "layer_past"}
    return {k: None if k in caches else v for k, v in kwargs.items()}


def moved(value: Any) -> Any:
    """The same structure of arguments with all tensors on the CPU, floating ones in float32."""
    if isinstance(value, Tensor):
        return value.detach().cpu().float() if value.is_floating_point() else value.detach().cpu()
    if isinstance(value, Mapping):
        return {k: moved(v) for k, v in value.items()}
    if type(value) in (tuple, list):
        return type(value)(moved(v) for v in value)
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a is b or a == b)


def materialize(module: nn.Module, prefix: str, load: Callable[[str], Tensor | None], *, recurse: bool = True) -> int:
    """Give parameters on the meta device their values, in float32; returns the bytes taken.

    Those of `module` and, with `recurse`, of everything below it.

    load: the tensor of a state-dict name, None for one the checkpoint does not have (tied to another). Raises
    CheckpointError (LB0107) for values that are not finite.
    """
    taken = 0
    for path, owner in module.named_modules() if recurse else [("", module)]:
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter.device.type != "meta":
                continue
            full = ".".join(part for part in (prefix, path, name) if part)
            stored = load(full)
            if stored is None:
                continue
            value = stored.float().contiguous()
            check_finite(value, full)
            owner._parameters[name] = nn.Parameter(value, requires_grad=False)
            taken += value.numel() * value.element_size()
    return taken


def release(module: nn.Module, *, recurse: bool = True) -> None:
    """Put parameters (see `materialize`) back on the meta device, freeing their memory."""
    for owner in module.modules() if recurse else [module]:
        for name, parameter in list(owner.named_parameters(recurse=False)):
            owner._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def outside_modules(network: nn.Module, skip: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Modules, with their paths, that are neither in `skip` nor below one of them."""
    hidden = {id(m) for top in skip for m in top.modules()}
    return [(name, m) for name, m in network.named_modules() if id(m) not in hidden]
