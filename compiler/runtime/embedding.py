"""A quantized embedding table: `torch.ops.lowbit.embedding`, its module, and sharing with the output layer.

Where the output layer is tied to the table, both read the same packed bytes: the layer's, for it is what is multiplied.
"""

from __future__ import annotations

import json
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.codegen.check import sample_weight
from lowbit.codegen.cpp.table import TableKernel, load_table, table_problem, table_source
from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.codegen.reference.table import gather_rows
from lowbit.codegen.select import say_once
from lowbit.codegen.table import TableSpec, parse_table_spec
from lowbit.compiler.errors import KernelError, RunError
from lowbit.compiler.ir.target import Target, host_target
from lowbit.compiler.runtime import prebuilt
from lowbit.compiler.runtime.cache import KernelCache
from lowbit.compiler.runtime.modules import PackedLinear, QuantLinear
from lowbit.compiler.runtime.native import build_native
from lowbit.compiler.runtime.ops import LIBRARY
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.methods import make_method
from lowbit.quantizers.qtensor import PackedWeight
from lowbit.quantizers.weights import QWeight

__all__ = ["QuantEmbedding", "build_table", "check_table", "quantize_embedding", "quantize_head", "table_kernel"]

_lock = threading.Lock()


@cache
def table_kernel(key: str) -> TableKernel | None:
    """This machine's kernel for a table, built on first use; None where torch must do, which is said once."""
    spec, target = parse_table_spec(key), host_target()
    shipped = prebuilt.prebuilt_file(key, target, lambda t: table_source(spec, t.arch))
    if shipped is not None:
        return load_table(shipped, spec)
    why = table_problem(spec) or (None if find_compiler() else "no C++ compiler was found")
    if why is not None and prebuilt.frozen() and not table_problem(spec):
        raise prebuilt.missing_kernel(f"rows of {spec.format}", target)
    if why is not None:
        say_once(f"rows of {spec.format} are looked up by torch: correct, but slow; {why}")
        return None
    with _lock:
        return build_table(spec, target, KernelCache())


def build_table(spec: TableSpec, target: Target, cache_: KernelCache) -> TableKernel:
    """Compile, check and store the kernel, or load it from the cache. Raises KernelError (LB04xx)."""
    return build_native(
        spec,
        table_source(spec, target.arch),
        target,
        cache_,
        lambda artifact: load_table(artifact, spec),
        lambda kernel: check_table(spec, kernel),
        f"rows of {spec.format}",
    )


def check_table(spec: TableSpec, kernel: TableKernel) -> None:
    """Raise KernelError (LB0408) unless `kernel` gives the reference's numbers, on a few rows of a random table."""
    rows = min(spec.rows, 40)
    weight = sample_weight(TableSpec(rows, spec.k, spec.format, spec.layout).linear)
    ids = torch.randint(0, rows, (16,), generator=torch.Generator().manual_seed(1))
    got, want = kernel(ids, [weight.tensors[name] for name in spec.linear.operands]), gather_rows(weight, ids)
    if not torch.allclose(got, want, rtol=1e-6, atol=1e-30):
        raise KernelError("LB0408", f"kernel disagrees with the reference: rows of {spec.format} differ")


def _embedding(ids: Tensor, weight: list[Tensor], spec: str) -> Tensor:
    parsed, flat = parse_table_spec(spec), ids.reshape(-1).to(torch.int64).contiguous()
    kernel = table_kernel(spec) if ids.device.type == "cpu" else None
    if kernel is not None:
        out = kernel(flat, weight)
    else:
        s = parsed.linear
        packed = PackedWeight(s.weight_format, s.layout_, s.segments, s.k, dict(zip(s.operands, weight, strict=True)))
        out = gather_rows(packed, flat)
    return out.view(*ids.shape, parsed.k)


def _embedding_fake(ids: Tensor, weight: list[Tensor], spec: str) -> Tensor:
    return ids.new_empty((*ids.shape, _columns(spec)), dtype=torch.float32)


@cache
def _columns(spec: str) -> int:
    """Columns of a table, without the tensors that its format makes: under a fake-tensor mode they would be fake."""
    return int(json.loads(spec)["table"]["k"])


LIBRARY.define("embedding(Tensor ids, Tensor[] weight, str spec) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
for _key in ("CPU", "CUDA"):
    LIBRARY.impl("embedding", _embedding, _key)
torch.library.register_fake("lowbit::embedding", _embedding_fake, lib=LIBRARY)


class QuantEmbedding(nn.Module):
    """Rows of a packed matrix by token id; the drop-in for `nn.Embedding`.

    packed: the matrix [entries, features], which an output layer may hold too: nothing is copied. dtype: of what comes
    out. `state_dict` gives the table dense, as `weight`, for readers that know nothing of this module.
    """

    def __init__(self, packed: PackedLinear, dtype: torch.dtype, tied: str = "") -> None:
        super().__init__()
        weight = packed.packed()
        self.packed, self.dtype, self.tied = packed, dtype, tied
        self.num_embeddings, self.embedding_dim, self.fmt = weight.n, weight.k, weight.fmt
        self.key = TableSpec(weight.n, weight.k, str(weight.fmt), str(weight.layout)).key()

    def forward(self, input: Tensor) -> Tensor:
        """int [...] -> [..., features]."""
        rows: Tensor = torch.ops.lowbit.embedding(input, self.packed.operands(), self.key)
        return rows.to(self.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        ids = torch.arange(self.num_embeddings, device=self.packed.device)
        destination[f"{prefix}weight"] = gather_rows(self.packed.packed(), ids).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.fmt}" + (
            f", tied to {self.tied}" if self.tied else ""
        )


def quantize_embedding(model: nn.Module, format: str = "int8.ch.sym") -> nn.Module:
    """Round the token embeddings of `model` to `format`, in place, and return it.

    An output layer that is tied to the table becomes a quantized layer on the same bytes. Raises RunError (LB0578)
    where there is no plain table, FormatError (LB0213) when the format does not fit it.
    """
    table = getattr(model, "get_input_embeddings", lambda: None)()
    if type(table) is not nn.Embedding or table.max_norm is not None:
        what = "no embedding table" if table is None else f"a {type(table).__name__}, not a plain embedding table"
        raise RunError("LB0578", f"{type(model).__name__} has {what}", hint="keep the table as it is")
    head, dense = model.get_output_embeddings(), table.weight.detach()  # type: ignore[operator]
    tied = type(head) is nn.Linear and head.weight is table.weight
    layer = QuantLinear.from_qtensor(_rounded(dense, format), head.bias if tied else None)
    layer = layer.to(dense.device).eval()
    assert layer.inner is not None
    path = next(name for name, module in model.named_modules() if module is head) if tied else ""
    model.set_input_embeddings(QuantEmbedding(layer.inner, dense.dtype, path).eval())  # type: ignore[operator]
    if tied:
        model.set_output_embeddings(layer)  # type: ignore[operator]
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]  # a checkpoint has two tensors from now on
    return model


def quantize_head(model: nn.Module, format: str = "int8.ch.sym") -> nn.Module:
    """Round the dense output layer of `model` to `format`, in place, and return it: of a small model it is most of what
    a token reads.

    An embedding table that it is tied to stays as it is (`quantize_embedding` has them share the rounded numbers). Does
    nothing where the layer has this format already. Raises RunError (LB0567) where there is no dense output layer,
    FormatError (LB0213) when the format does not fit it.
    """
    dense = getattr(model, "get_output_embeddings", lambda: None)()
    if isinstance(dense, QuantLinear) and str(dense.fmt) == str(parse_format(format)):
        return model
    if type(dense) is not nn.Linear:
        raise RunError("LB0567", "there is no dense output layer to quantize", where=type(model).__name__)
    bias = None if dense.bias is None else dense.bias.detach()
    layer = QuantLinear.from_qtensor(_rounded(dense.weight.detach(), format, "lm_head"), bias)
    model.set_output_embeddings(layer.to(dense.weight.device).eval())  # type: ignore[operator]
    model.config.tie_word_embeddings = False  # type: ignore[union-attr]  # a checkpoint has two tensors from now on
    return model


def _rounded(dense: Tensor, text: str, where: str = "embeddings") -> QWeight:
    """A matrix rounded to nearest: eight bits gain nothing from a search for ranges, and it is large."""
    fmt = parse_format(text)
    fmt.check(dense.shape[0], dense.shape[1], where)
    return make_method("rtn", {"clip_search": False}).quantize(dense.float().cpu(), fmt, None).qtensor
