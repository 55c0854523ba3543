"""import: a torch model becomes a graph, by running it once on meta tensors and writing down what it does.

No weights are needed and nothing is computed. Modules lowbit knows (linear, embedding, norms, activations) become one
operation each; torch functions it knows outside of them become `add`, `mul`, `silu`, `attention`; everything else is
`lb.opaque`, so the graph is complete whatever the architecture. The token dimension is recognised by a probe length
no model uses as a feature size.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from xdsl.dialects.builtin import ArrayAttr, DictionaryAttr, FloatAttr, IntAttr, ModuleOp, StringAttr, f64
from xdsl.ir import Attribute, Block, Region, SSAValue

from lowbit.compiler.errors import IRError
from lowbit.compiler.ir import graph as lb
from lowbit.compiler.ir.text import verify_module
from lowbit.compiler.ir.types import DTYPE_NAMES, QType, tensor

__all__ = ["import_model"]

PROBE_TOKENS = 8191
_FUNCTIONS: dict[str, type[lb.GraphOp]] = {
    "silu": lb.Silu,
    "gelu": lb.Gelu,
    "scaled_dot_product_attention": lb.Attention,
    "matmul": lb.Matmul,
}
_BINARY: dict[str, type[lb.GraphOp]] = {"add": lb.Add, "mul": lb.Mul}


def import_model(model: nn.Module, name: str = "model", probe: Any = None) -> ModuleOp:
    """The graph of a causal language model (or any module, given `probe`: its keyword arguments on meta).

    `model` may live on any device and is not changed; it is run on meta copies of its parameters. Raises IRError
    (LB0320) when the model cannot be traced, saying at which module.
    """
    meta = _meta_copy(model)
    extra = {"use_cache": False} if probe is None else {}
    try:
        return _traced(meta, name, probe or _causal_lm_inputs(), extra)
    except IRError:
        if probe is not None or "position_ids" not in inspect.signature(model.forward).parameters:
            raise
    # Models with learned positions (OPT) count them from the mask, whose final form they do not understand.
    positions = torch.zeros(1, PROBE_TOKENS, dtype=torch.int64, device="meta")
    return _traced(meta, name, {**_causal_lm_inputs(), "position_ids": positions}, extra)


def _traced(meta: nn.Module, name: str, inputs: dict[str, torch.Tensor], extra: dict[str, Any]) -> ModuleOp:
    recorder = _Recorder(meta, PROBE_TOKENS)
    for value in inputs.values():
        recorder.input(value)
    try:
        with torch.no_grad(), torch.device("meta"), recorder.hooked(), recorder:
            out = meta(**inputs, **extra)
    except (RuntimeError, TypeError, NotImplementedError, ValueError) as e:
        raise IRError("LB0320", f"cannot trace the model: {e}", where=recorder.path or name) from e
    return recorder.finish(name, out)


def _causal_lm_inputs() -> dict[str, torch.Tensor]:
    """Token ids, and the attention mask in its final form: building it would look at values."""
    t = PROBE_TOKENS
    return {
        "input_ids": torch.zeros(1, t, dtype=torch.int64, device="meta"),
        "attention_mask": torch.zeros(1, 1, t, t, dtype=torch.bool, device="meta"),
    }


def _meta_copy(model: nn.Module) -> nn.Module:
    """The same modules with parameters on meta; values (and memory) are not copied."""
    memo: dict[int, Any] = {}
    for t in (*model.parameters(), *model.buffers()):
        memo.setdefault(id(t), _on_meta(t))
    return copy.deepcopy(model, memo).eval()


def _on_meta(t: torch.Tensor) -> torch.Tensor:
    empty = torch.empty_like(t, device="meta")
    return nn.Parameter(empty, requires_grad=False) if isinstance(t, nn.Parameter) else empty


class _Recorder(TorchFunctionMode):
    """Writes operations down while a model runs on meta tensors."""

    def __init__(self, model: nn.Module, tokens: int) -> None:
        super().__init__()
        self.block, self.tokens, self.path = Block(), tokens, ""
        self._values: dict[int, SSAValue] = {}
        self._keep: list[torch.Tensor] = []  # ids stay unique while tensors live
        self._inside = 0
        self._modules = dict(model.named_modules())
        self._names = {id(p): n for n, p in model.named_parameters()}  # a tied weight has its first name
        self._weights: dict[str, SSAValue] = {}

    def input(self, value: torch.Tensor) -> None:
        """Declare a graph input."""
        self._bind(value, self.block.insert_arg(self._type(value), len(self.block.args)))

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Replace the forward of known modules while tracing."""
        changed = []
        for path, module in self._modules.items():
            if (emit := _emitter(module)) is not None:
                original = module.forward
                module.forward = self._wrap(path, module, original, emit)
                changed.append(module)
        try:
            yield
        finally:
            for module in changed:
                del module.forward  # the class's method shows again

    def _wrap(self, path: str, module: nn.Module, original: Callable[..., Any], emit: Emitter) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.path = path
            x = args[0] if args else next(iter(kwargs.values()))
            operand = self.value(x)
            self._inside += 1
            try:
                out = original(*args, **kwargs)
            finally:
                self._inside -= 1
            op = emit(self, path, module, operand, self._type(out))
            self._bind(out, op.outs[0])
            return out

        return forward

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._inside or not _is_call(func):
            return out
        results = [o for o in _flat(out) if isinstance(o, torch.Tensor)]
        operands = [a for a in _flat((args, kwargs or {})) if isinstance(a, torch.Tensor)]
        if results and not all(id(r) in self._values for r in results):
            self._record(func.__name__, operands, results)
        return out

    def _record(self, name: str, operands: list[torch.Tensor], results: list[torch.Tensor]) -> None:
        plain = name.strip("_")
        cls = _BINARY.get(plain) if len(operands) == 2 else _FUNCTIONS.get(plain)
        types = [self._type(r) for r in results]
        values = [self.value(o) for o in operands]
        op: lb.GraphOp
        if cls is not None and self._fits(cls, operands, results):
            op = cls(values, types)
        else:
            op = lb.Opaque(values, types, {"call": StringAttr(plain)})
        self._add(op, self.path.rpartition(".")[0])
        for result, out in zip(results, op.outs, strict=True):
            self._bind(result, out)

    @staticmethod
    def _fits(cls: type[lb.GraphOp], operands: list[torch.Tensor], results: list[torch.Tensor]) -> bool:
        if cls is lb.Attention:
            return len(operands) in (3, 4)
        if cls is lb.Matmul:
            return len(operands) == 2 and operands[0].dim() == operands[1].dim()
        longest = max((o.shape for o in operands), key=len)
        return len(results) == 1 and results[0].shape == longest

    def value(self, t: torch.Tensor) -> SSAValue:
        """The SSA value of a tensor; tensors from nowhere are weights (by name) or opaque constants."""
        if id(t) in self._values:
            return self._values[id(t)]
        if (name := self._names.get(id(t))) is not None:
            return self.weight(name, self._type(t))
        op = lb.Opaque([], [self._type(t)], {"call": StringAttr("constant")})
        self._add(op, self.path)
        self._bind(t, op.outs[0])
        return op.outs[0]

    def weight(self, name: str, type_: Attribute) -> SSAValue:
        """The `lb.weight` called `name`, declared once."""
        if name not in self._weights:
            op = lb.Weight.of([name], type_)
            self._add(op, name.rpartition(".")[0])
            self._weights[name] = op.outs[0]
        return self._weights[name]

    def parameter(self, path: str, module: nn.Module, name: str) -> SSAValue | None:
        """The weight `path.name`, under its first name when it is tied; None when the module has none."""
        p = getattr(module, name, None)
        if not isinstance(p, torch.Tensor):
            return None
        return self.weight(self._names.get(id(p), f"{path}.{name}"), self._type(p))

    def emit(
        self, path: str, cls: type[lb.GraphOp], operands: list[SSAValue], out: Attribute, **attributes: Attribute
    ) -> lb.GraphOp:
        """Append an operation for the module at `path`."""
        op = cls(operands, [out], attributes)
        self._add(op, path)
        return op

    def finish(self, name: str, out: Any) -> ModuleOp:
        """The verified module with one graph that returns the model's tensors."""
        outs = [self.value(o) for o in _flat(out) if isinstance(o, torch.Tensor)]
        self.block.add_op(lb.Return(outs, []))
        module = ModuleOp([lb.Graph(name, Region(self.block))])
        verify_module(module, after="import")
        return module

    def _add(self, op: lb.GraphOp, path: str) -> None:
        self.block.add_op(lb.at(op, path) if path else op)

    def _bind(self, t: torch.Tensor, value: SSAValue) -> None:
        self._values[id(t)] = value
        self._keep.append(t)

    def _type(self, t: torch.Tensor) -> Attribute:
        shape = [None if d == self.tokens else d for d in t.shape]
        if (name := DTYPE_NAMES.get(str(t.dtype).removeprefix("torch."))) is None:
            raise IRError("LB0320", f"no kernel takes {t.dtype} activations", hint="use model.float()")
        return tensor(shape, name)


Emitter = Callable[[_Recorder, str, nn.Module, SSAValue, Attribute], lb.GraphOp]


def _linear(r: _Recorder, path: str, module: nn.Module, x: SSAValue, out: Attribute) -> lb.GraphOp:
    bias = r.parameter(path, module, "bias")
    if (fmt := getattr(module, "fmt", None)) is not None:
        type_ = QType.get(module.out_features, module.in_features, str(fmt))  # type: ignore[arg-type]
        weight = r.weight(f"{path}.weight", type_)
    else:
        dense = r.parameter(path, module, "weight")
        assert dense is not None
        weight = dense
    operands = [x, weight] if bias is None else [x, weight, bias]
    steps = {} if bias is None else {"epilogue": ArrayAttr([StringAttr("bias")])}
    asked: dict[str, Attribute] = {
        name: StringAttr(value) if isinstance(value, str) else IntAttr(value)
        for name, value in getattr(module, "asks", dict)().items()
    }
    return r.emit(path, lb.Linear, operands, out, **steps, **({"input": DictionaryAttr(asked)} if asked else {}))


def _quantized_table(r: _Recorder, path: str, module: nn.Module, x: SSAValue, out: Attribute) -> lb.GraphOp:
    """Rows of a packed table, which is the output layer's weight where that is tied to it."""
    shape = (int(module.num_embeddings), int(module.embedding_dim))  # type: ignore[arg-type]
    table = r.weight(f"{module.tied or path}.weight", QType.get(*shape, str(module.fmt)))
    return r.emit(path, lb.Embedding, [x, table], out)


def _table(cls: type[lb.GraphOp]) -> Emitter:
    def emit(r: _Recorder, path: str, module: nn.Module, x: SSAValue, out: Attribute) -> lb.GraphOp:
        extra = [v for v in (r.parameter(path, module, n) for n in ("weight", "bias")) if v is not None]
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        attributes: dict[str, Attribute] = {} if eps is None else {"eps": FloatAttr(float(eps), f64)}
        return r.emit(path, cls, [x, *extra], out, **attributes)

    return emit


_RULES: tuple[tuple[Callable[[nn.Module], bool], Emitter], ...] = (
    (lambda m: isinstance(m, nn.Linear) or type(m).__name__ == "QuantLinear", _linear),
    (lambda m: isinstance(m, nn.Embedding) and type(m).forward is nn.Embedding.forward, _table(lb.Embedding)),
    (lambda m: type(m).__name__ == "QuantEmbedding", _quantized_table),
    (lambda m: isinstance(m, nn.LayerNorm), _table(lb.LayerNorm)),
    (lambda m: type(m).__name__.endswith("RMSNorm") and hasattr(m, "weight"), _table(lb.RmsNorm)),
    (lambda m: type(m).__name__ in ("SiLU", "SiLUActivation"), _table(lb.Silu)),
    (lambda m: type(m).__name__.startswith("GELU"), _table(lb.Gelu)),
)
"""(does this module match, how it is written down), first match wins."""


def _emitter(module: nn.Module) -> Emitter | None:
    return next((emit for matches, emit in _RULES if matches(module)), None)


def _is_call(func: Callable[..., Any]) -> bool:
    """Leave out attribute access (`x.shape` arrives here as a property getter)."""
    return getattr(func, "__name__", "") not in ("__get__", "__set__", "size", "dim", "numel", "is_floating_point")


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for v in value.values():
            yield from _flat(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _flat(v)
    else:
        yield value
