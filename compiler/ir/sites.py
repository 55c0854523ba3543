"""Sites: where a graph's linear layers get their inputs from, and who may change what there.

A *site* is one tensor that linear layers read: q, k and v share one, gate and up share one. Its producer says how its
channels can be scaled, reordered or rotated without changing what the model computes: through the weight of a norm,
through the rows of the layers before it, or through the value rows of attention. The *stream* is the residual stream:
every table, norm and layer that writes or reads it, which is what a rotation of the whole stream has to touch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from xdsl.dialects.builtin import ModuleOp
from xdsl.ir import Operation, SSAValue

from lowbit.compiler.ir import graph as lb
from lowbit.compiler.ir.types import dims

__all__ = ["Norm", "Producer", "Rows", "Site", "Stream", "Structure", "Values", "find_sites"]

_SAME = {"getitem", "contiguous", "reshape", "view", "to", "dropout", "float", "clone", "type_as", "flatten"}
_SCALAR = {"mul", "div", "truediv"}
_MOVES = _SAME | {"transpose", "permute", "expand", "unsqueeze", "squeeze", "repeat_interleave", "unflatten"}
_ELEMENTWISE = {"relu", "tanh", "sigmoid", "gelu", "silu", "softplus", "relu_", "silu_"}
_LINEAR_TAILS = {"relu", "relu_"}
"""Activations a positive factor passes through."""


@dataclass(frozen=True)
class Norm:
    """A norm whose output only linear layers read. weight, bias: tensor names. offset: 1 where the norm multiplies
    by 1 + weight. centered: it subtracts the mean first."""

    path: str
    weight: str
    bias: str | None = None
    centered: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class Rows:
    """Outputs of linear layers, combined element by element. layers: all of them, whose rows belong together. scaled:
    the one through which a positive factor passes to the result, None where there is none."""

    layers: tuple[str, ...]
    scaled: str | None


@dataclass(frozen=True)
class Values:
    """What attention gives: weighted sums of rows of the layer `value`, `kv_heads` heads of `dim` channels, each used
    by heads / kv_heads neighbouring heads of the site."""

    value: str
    heads: int
    kv_heads: int
    dim: int


Producer = Norm | Rows | Values


@dataclass(frozen=True)
class Site:
    """One tensor that linear layers read: their module paths, its channels, what makes it, or why that is unknown."""

    consumers: tuple[str, ...]
    width: int
    producer: Producer | None
    problem: str = ""

    @property
    def name(self) -> str:
        """The first consumer's path: what reports call the site."""
        return self.consumers[0]


@dataclass(frozen=True)
class Stream:
    """The residual stream. tables: embedding tensors. norms: every norm that reads it. writers: layers whose outputs
    are added to it."""

    width: int
    tables: tuple[str, ...]
    norms: tuple[Norm, ...]
    writers: tuple[str, ...]


@dataclass(frozen=True)
class Structure:
    """What a graph's linear layers read and write. weights, biases: tensor name by module path. tables: embeddings.
    stream is None where `problem` says why the residual stream cannot be followed."""

    sites: tuple[Site, ...]
    stream: Stream | None
    problem: str
    weights: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    tables: tuple[str, ...] = ()

    def readers(self, norm: Norm) -> tuple[str, ...]:
        """The layers that read a norm's output."""
        return tuple(
            path
            for site in self.sites
            if isinstance(site.producer, Norm) and site.producer.path == norm.path
            for path in site.consumers
        )

    def shared(self, path: str) -> bool:
        """Whether the layer's weight is also another's, or an embedding's: such a weight is never changed in place."""
        name = self.weights[path]
        return name in self.tables or sum(other == name for other in self.weights.values()) > 1


def find_sites(module: ModuleOp) -> Structure:
    """The structure of the (canonicalized) graph in `module`."""
    linears = [op for op in module.walk() if isinstance(op, lb.Linear) and lb.path_of(op)]
    groups: dict[SSAValue, list[lb.Linear]] = {}
    for linear in linears:
        groups.setdefault(_origin(linear.args_[0]), []).append(linear)
    sites = tuple(_site(value, readers) for value, readers in groups.items())
    weights, biases = {}, {}
    for linear in linears:
        if (name := _weight_name(linear.args_[1])) is not None:
            weights[lb.path_of(linear)] = name
        if "bias" in linear.steps() and (name := _weight_name(linear.args_[2])) is not None:
            biases[lb.path_of(linear)] = name
    follower = _Follower(module)
    try:
        stream, problem = follower.stream(), ""
    except _Declined as e:
        stream, problem = None, str(e)
    return Structure(sites, stream, problem, weights, biases, tuple(follower.tables))


class _Declined(Exception):
    """Why a rewrite cannot be done."""


def _weight_name(value: SSAValue) -> str | None:
    return value.owner.names.data[0].data if isinstance(value.owner, lb.Weight) else None


def _width(value: SSAValue) -> int:
    return dims(value.type)[-1] or 0


def _passes(op: Operation | object) -> bool:
    """Whether `op` hands on its one operand, channels in place (a slice of tokens, a scalar factor are fine)."""
    if isinstance(op, lb.Opaque) and len(op.args_) == 1 and len(op.outs) == 1:
        same = dims(op.args_[0].type)[-1:] == dims(op.outs[0].type)[-1:]
        return same and op.call.data in _SAME | _SCALAR
    return isinstance(op, lb.Mul) and _scalar_side(op) is not None


def _scalar_side(op: lb.Mul) -> int | None:
    """Which operand is a single number."""
    for i in (0, 1):
        if all(d == 1 for d in dims(op.args_[i].type)):
            return i
    return None


def _origin(value: SSAValue) -> SSAValue:
    """The value behind reshapes that leave the channels alone."""
    while isinstance(op := value.owner, lb.Opaque) and _passes(op) and op.call.data in _SAME:
        value = op.args_[0]
    return value


def _terminal_uses(value: SSAValue) -> Iterator[tuple[Operation, int]]:
    """Uses of a value and of what `_origin` would lead back to it."""
    for use in value.uses:
        op = use.operation
        if isinstance(op, lb.Opaque) and _passes(op) and op.call.data in _SAME:
            yield from _terminal_uses(op.outs[0])
        else:
            yield op, use.index


def _site(value: SSAValue, readers: Sequence[lb.Linear]) -> Site:
    paths = tuple(lb.path_of(r) for r in readers)
    others = [op for op, index in _terminal_uses(value) if not (isinstance(op, lb.Linear) and index == 0)]
    if others:
        return Site(paths, _width(value), None, f"{_where(others[0])} reads the same tensor")
    try:
        return Site(paths, _width(value), _producer(value))
    except _Declined as e:
        return Site(paths, _width(value), None, str(e))


def _where(op: Operation) -> str:
    kind = op.call.data if isinstance(op, lb.Opaque) else op.name
    return f"{kind} in {lb.path_of(op)}" if lb.path_of(op) else kind


def _producer(value: SSAValue) -> Producer:
    op = value.owner
    if isinstance(op, lb.RmsNorm | lb.LayerNorm):
        return _norm(op)
    if isinstance(op, lb.Opaque) and op.call.data in _MOVES:
        return _values(value)
    layers = tuple(dict.fromkeys(_row_layers(value, top=True)))
    return Rows(layers, _scaled_layer(value))


def _norm(op: lb.GraphOp) -> Norm:
    names = [_weight_name(a) for a in op.args_[1:]]
    if not names or names[0] is None:
        raise _Declined(f"{_where(op)} has no weight")
    return Norm(lb.path_of(op), names[0], names[1] if len(names) > 1 else None, centered=isinstance(op, lb.LayerNorm))


def _row_layers(value: SSAValue, top: bool = False) -> Iterator[str]:
    """The linear layers whose outputs `value` is made of, channel by channel."""
    value = _origin(value)
    op = value.owner
    if not top and len(list(_terminal_uses(value))) != 1:
        raise _Declined(f"the output of {_where(op) if isinstance(op, Operation) else 'an input'} is used elsewhere")
    if isinstance(op, lb.Linear):
        yield lb.path_of(op)
    elif isinstance(op, lb.SiluMul | lb.Mul | lb.Silu | lb.Gelu):
        for operand in op.args_:
            yield from _row_layers(operand)
    elif isinstance(op, lb.Opaque) and op.call.data in _ELEMENTWISE and len(op.args_) == 1:
        yield from _row_layers(op.args_[0])
    else:
        raise _Declined(f"it is made by {_where(op) if isinstance(op, Operation) else 'an input'}")


def _scaled_layer(value: SSAValue) -> str | None:
    op = value.owner
    if isinstance(op, lb.SiluMul):
        return _linear_path(op.args_[1])
    if isinstance(op, lb.Mul):
        return _linear_path(op.args_[1]) or _linear_path(op.args_[0])
    if isinstance(op, lb.Opaque) and op.call.data in _LINEAR_TAILS:
        return _linear_path(op.args_[0])
    return None


def _linear_path(value: SSAValue) -> str | None:
    op = _origin(value).owner
    return lb.path_of(op) if isinstance(op, lb.Linear) else None


def _values(value: SSAValue) -> Values:
    """Back through the merging of heads to attention, and through the splitting of heads to the value layer."""
    op = _behind_moves(value).owner
    if isinstance(op, lb.Attention):
        v = op.args_[2]
    elif isinstance(op, lb.Matmul) or (isinstance(op, lb.Opaque) and op.call.data == "matmul" and len(op.args_) == 2):
        v = op.args_[1]
    else:
        raise _Declined(f"it is made by {_where(op) if isinstance(op, Operation) else 'an input'}")
    dim = dims(op.outs[0].type)[-1]
    source = _behind_moves(v)
    layer = source.owner
    if not isinstance(layer, lb.Linear) or dim is None:
        raise _Declined("the values of attention are not those of one linear layer")
    if len(list(source.uses)) != 1 or _width(source) % dim or _width(value) % dim:
        raise _Declined(f"the output of {_where(layer)} is used elsewhere")
    heads, kv_heads = _width(value) // dim, _width(source) // dim
    if heads % kv_heads:
        raise _Declined(f"{heads} heads cannot share {kv_heads} value heads evenly")
    return Values(lb.path_of(layer), heads, kv_heads, dim)


def _behind_moves(value: SSAValue) -> SSAValue:
    """The value before views, transposes and the repetition of heads; never before one that takes channels away."""
    while isinstance(op := value.owner, lb.Opaque) and op.call.data in _MOVES and len(op.args_) == 1:
        if _count(op.args_[0]) > _count(value):
            raise _Declined(f"{_where(op)} takes a part of it")
        value = op.args_[0]
    return value


def _count(value: SSAValue) -> int:
    """Numbers per token."""
    return math.prod(d for d in dims(value.type) if d is not None)


@dataclass
class _Follower:
    """Walks the residual stream from the embeddings to the last norm; raises _Declined where it cannot."""

    module: ModuleOp
    tables: dict[str, None] = field(default_factory=dict)
    norms: dict[str, Norm] = field(default_factory=dict)
    writers: dict[str, None] = field(default_factory=dict)

    def stream(self) -> Stream:
        """Everything that touches the stream."""
        work: list[SSAValue] = []
        work += [op.outs[0] for op in self.module.walk() if isinstance(op, lb.GraphOp) and self._table(op)]
        self._members = set(work)
        if not work:
            raise _Declined("no embedding table was found")
        pending: list[tuple[lb.Add, SSAValue]] = []
        while work:
            for use in work.pop().uses:
                work += self._follow(use.operation, use.index, pending)
        for add, value in pending:
            other = next(a for a in add.args_ if a is not value) if add.args_[0] is not add.args_[1] else value
            if other not in self._members:
                self._write(add, other)
        return Stream(self._width(), tuple(self.tables), tuple(self.norms.values()), tuple(self.writers))

    def _table(self, op: lb.GraphOp) -> bool:
        """Notes an embedding's table."""
        if isinstance(op, lb.Embedding):
            name = _weight_name(op.args_[1])
        elif isinstance(op, lb.Opaque) and op.call.data == "embedding":
            name = next((n for a in op.args_ if (n := _weight_name(a)) is not None), None)
        else:
            return False
        if name is None:
            raise _Declined("an embedding table is not a weight")
        self.tables[name] = None
        return True

    def _width(self) -> int:
        widths = {_width(v) for v in self._members}
        if len(widths) != 1:
            raise _Declined(f"embeddings of different widths ({', '.join(map(str, sorted(widths)))})")
        return widths.pop()

    def _follow(self, op: Operation, index: int, pending: list[tuple[lb.Add, SSAValue]]) -> list[SSAValue]:
        """The values a use of the stream adds to it."""
        if isinstance(op, lb.RmsNorm | lb.LayerNorm) and index == 0:
            self._read(op)
            return []
        if isinstance(op, lb.Add):
            pending.append((op, op.args_[index]))
        elif not (_passes(op) and (not isinstance(op, lb.Mul) or _scalar_side(op) != index)):
            raise _Declined(f"the residual stream is read by {_where(op)}")
        assert isinstance(op, lb.GraphOp)
        new: list[SSAValue] = [out for out in op.outs if out not in self._members]
        self._members.update(new)
        return new

    def _read(self, op: lb.GraphOp) -> None:
        for user, index in _terminal_uses(op.outs[0]):
            if not (isinstance(user, lb.Linear) and index == 0):
                raise _Declined(f"the output of {_where(op)} is read by {_where(user)}")
        self.norms[lb.path_of(op)] = _norm(op)

    def _write(self, add: lb.Add, value: SSAValue) -> None:
        while _passes(value.owner) and len(list(value.uses)) == 1:
            owner = value.owner
            assert isinstance(owner, lb.GraphOp)
            scalar = _scalar_side(owner) if isinstance(owner, lb.Mul) else None
            value = owner.args_[1 - scalar] if scalar is not None else owner.args_[0]
        op = value.owner
        if isinstance(op, lb.Add) and len(list(value.uses)) == 1:  # attention and MLP side by side
            for part in op.args_:
                self._write(op, part)
            return
        if not isinstance(op, lb.Linear) or len(list(value.uses)) != 1:
            made = _where(op) if isinstance(op, Operation) else "an input"
            raise _Declined(f"{made} is added to the residual stream, not the output of one linear layer")
        self.writers[lb.path_of(op)] = None
