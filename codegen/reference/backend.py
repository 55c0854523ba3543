"""Runs a KernelSpec as written: decode every weight, multiply in float32, finish."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from lowbit.codegen.backend import Backend, Launcher, Source
from lowbit.codegen.decode import outlier_program, scalar_program, vector_program
from lowbit.codegen.reference.torch_ops import TORCH
from lowbit.codegen.schedule import Schedule
from lowbit.codegen.spec import KernelSpec
from lowbit.compiler.ir.program import Program
from lowbit.compiler.ir.target import Target
from lowbit.quantizers.formats import Format, VectorFormat
from lowbit.quantizers.hadamard import rotate
from lowbit.quantizers.qtensor import PackedWeight, column_map, full_scales, padded_columns, padded_group
from lowbit.quantizers.vqtensor import BOOKS, VQTensor, unpack_vectors

__all__ = ["ReferenceBackend", "decode_stored", "decode_weight", "finish", "prepare_activations", "run_reference"]

_TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def decode_weight(weight: PackedWeight) -> torch.Tensor:
    """The packed weight as float32 [sum(segments), K], by running the format's decode program on the codes that the
    layout finds in the packed words."""
    if isinstance(weight.fmt, VectorFormat):
        on_cpu = replace(weight, tensors={name: t.cpu() for name, t in weight.tensors.items()})
        return torch.cat([_decode_vectors(q) for q in unpack_vectors(on_cpu)])
    dense, columns = decode_stored(weight), weight.tensors.get("columns")
    return dense if columns is None else dense[:, torch.argsort(columns.cpu())]


def decode_stored(weight: PackedWeight) -> torch.Tensor:
    """`decode_weight` in the order of columns in which `run_reference` has its activations: the stored one of scalar
    formats."""
    if not isinstance(weight.fmt, Format):
        return decode_weight(weight)
    fmt, layout, rows = weight.fmt, weight.layout, weight.rows
    cols = padded_columns(fmt, weight.k, layout.block)
    codes = layout.unpack([plane.cpu() for plane in weight.planes], fmt.bits, rows, cols)
    where, step = column_map(fmt, weight.k), padded_group(fmt, weight.k)
    group = torch.arange(weight.k) // fmt.granularity.group_size(weight.k) * fmt.terms
    sides = {"scale": full_scales(weight).cpu()}
    sides |= {n: layout.unpack_side(weight.tensors[n].cpu()).float() for n in ("zero", "offset") if n in weight.tensors}

    def term(i: int) -> torch.Tensor:
        args = {name: side[:, group + i] for name, side in sides.items()}
        args |= {"w0": fmt.element.windows(codes[:, where + i * step]), "s0": torch.tensor(0)}
        return scalar_program(fmt, (fmt.element.state_bits,)).run(TORCH, args)

    dense = sum((term(i) for i in range(1, fmt.terms)), term(0))
    tile, start, keep = layout.row_tile, 0, []
    for n in weight.segments:
        keep.append(dense[start : start + n])
        start += -(-n // tile) * tile
    return torch.cat(keep)


def _decode_vectors(q: VQTensor) -> torch.Tensor:
    """One vector-quantized matrix by its decode programs, then order and norms."""
    rows = torch.arange(q.n)[:, None]
    group = torch.arange(q.indices.shape[1]) // (q.indices.shape[1] // q.fmt.groups)

    def run(
        program: Program, dim: int, books: dict[str, torch.Tensor], indices: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        at = group if "book" in books and q.fmt.axis == "out" else torch.tensor(0)
        table = {**TORCH, "gather": lambda index, lane, book: books[book][at, index.long(), lane]}
        if q.fmt.axis == "in":
            lanes = torch.arange(q.k) % dim
            wide = {name: i.repeat_interleave(dim, dim=1) for name, i in indices.items()}
            return program.run(table, {"lane": lanes, **wide})
        return program.run(table, {"lane": rows % dim, **{name: i[rows[:, 0] // dim] for name, i in indices.items()}})

    main, rest, outlier = (q.book(name) for name in BOOKS)
    assert main is not None
    books, indices = {"book": main}, {"index": q.indices}
    if q.residual is not None and rest is not None:
        books["residual_book"], indices["residual_index"] = rest, q.residual
    dense = run(vector_program(q.fmt), q.fmt.dim, books, indices)
    if q.fmt.outliers and q.outlier_indices is not None and outlier is not None:
        books = {"outlier_book": outlier[None]}
        first = run(outlier_program(), q.fmt.outliers.dim, books, {"index": q.outlier_indices})
        dense = torch.cat([first, dense], dim=1)
    if q.perm is not None:
        dense = dense[:, torch.argsort(q.perm)]
    if q.norm_scale is None or q.norm_bias is None:
        return dense
    scale, bias = q.norm_scale.float(), q.norm_bias.float()
    return dense * scale + bias if q.fmt.norm == "col" else dense * scale[:, None] + bias[:, None]


def prepare_activations(spec: KernelSpec, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """float32 [M, K]: x normalised and rotated, in the stored order of columns (of scalar formats), and rounded to
    `activation`."""
    if spec.reads_rows:
        return spec.x_rows.numbers(x, weight.tensors.get("input_scale"))
    x = x.float()
    if spec.norm_eps:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + spec.norm_eps) * weight.tensors["norm_weight"].float()
    if spec.rotate:
        x = rotate(x, spec.rotate)
    if not spec.vector and (columns := weight.tensors.get("columns")) is not None:
        x = x[:, columns.long()]
    return spec.rounding.apply(x, weight.tensors.get("input_scale")) if spec.rounding else x


def run_reference(
    spec: KernelSpec,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dense: torch.Tensor | None = None,
) -> torch.Tensor:
    """epilogue(x @ W.T) in float32, rounded to the spec's output dtype: what every kernel is compared with; the rows
    uint8 [M, out_width] of a spec with an `out_activation`.

    x is first rotated and rounded as the spec says. dense: float32 [sum(segments), K], the decoded weight in its stored
    order of columns, where a caller has it already.
    """
    stored = dense if dense is not None else decode_stored(weight)
    y = finish(spec, prepare_activations(spec, x, weight) @ stored.to(x.device).T, bias, residual)
    return spec.out_rows.write(y, weight.tensors.get("output_scale")) if spec.out_rows else y


def finish(spec: KernelSpec, y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None) -> torch.Tensor:
    """The epilogue on float32 products [M, sum(segments)], rounded to the spec's output dtype."""
    for step in spec.epilogue:
        if step == "bias":
            assert bias is not None
            y = y + bias.float()
        elif step == "silu_mul":
            gate, up = y.chunk(2, dim=1)
            y = torch.nn.functional.silu(gate) * up
        else:
            assert residual is not None
            y = y + residual.float()
    return y.to(_TORCH_DTYPES[spec.out_dtype])


class ReferenceBackend(Backend):
    """Always there, on any device, for any spec; nothing is compiled."""

    name = "reference"
    kinds = ("cpu", "cuda", "ref")
    layout = "panel16"
    vector_layout = "vectors8"
    any_layout = True
    invariant = True

    def available(self, target: Target) -> str | None:
        return None

    def supports(self, spec: KernelSpec, target: Target) -> str | None:
        return None

    def space(self, spec: KernelSpec, target: Target, m: int) -> Iterable[Schedule]:
        yield Schedule()

    def illegal(self, spec: KernelSpec, schedule: Schedule, target: Target) -> str | None:
        return None

    def predict(self, spec: KernelSpec, schedule: Schedule, target: Target, m: int) -> float:
        """A weight is gathered, decoded and multiplied at about 50 million a second: never the fastest."""
        return spec.rows * spec.k / 5e7

    def emit(self, spec: KernelSpec, schedule: Schedule, target: Target) -> Source:
        return Source(spec.key(), ".json")

    def compile(self, source: Source, out: Path) -> None:
        out.write_text(source.text)

    def toolchain(self) -> str:
        return f"torch {torch.__version__}"

    def load(self, artifact: Path, spec: KernelSpec, schedule: Schedule) -> Launcher:
        def launch(
            x: torch.Tensor,
            weight: PackedWeight,
            bias: torch.Tensor | None,
            residual: torch.Tensor | None,
            out: torch.Tensor,
        ) -> None:
            if not spec.invariant:
                out.copy_(run_reference(spec, x, weight, bias, residual))
                return
            dense = decode_stored(weight)  # torch's products of several tokens are summed in another order
            for i in range(x.shape[0]):
                rest = None if residual is None else residual[i : i + 1]
                out[i : i + 1] = run_reference(spec, x[i : i + 1], weight, bias, rest, dense)

        return launch
