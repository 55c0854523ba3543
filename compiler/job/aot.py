"""`lowbit.export`: a quantized model as an AOTInductor package, with its kernels beside it.

torch.export -> lb -> siblings and epilogues fused -> AOTInductor. What is written is a folder: `model.pt2` and
`kernels/`, which holds every kernel the package calls, for every number of tokens it takes. Whoever loads it
(`lowbit.load_exported`) needs neither the model's code nor a compiler.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from lowbit.codegen.spec import KernelSpec
from lowbit.codegen.table import TableSpec, parse_table_spec
from lowbit.compiler.errors import RunError
from lowbit.compiler.frontend.dynamo import passes
from lowbit.compiler.frontend.explain import decisions
from lowbit.compiler.frontend.fx import grouped_specs, import_fx, value_of
from lowbit.compiler.frontend.fx_export import export_fx
from lowbit.compiler.io.kernels import FOLDER, MANIFEST, KernelFolder
from lowbit.compiler.io.write import staged_folder, write_json
from lowbit.compiler.ir.target import host_target
from lowbit.compiler.job.export import compile_kernels
from lowbit.compiler.pipeline import run_pipeline
from lowbit.compiler.runtime.dispatch import DTYPE_NAMES, classes_up_to, parse_spec
from lowbit.compiler.runtime.experts import prepare_experts
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.compiler.runtime.package import CALL, PACKAGE, describe_call
from lowbit.passes.session import PassContext

__all__ = ["PackageReport", "export_package", "kernels_of", "lower"]

_ROOM = 64 << 20  # bytes for the package's code


@dataclass(frozen=True)
class PackageReport:
    """out: the folder. kernels: how many files it has. fused, kept: as in `torch.compile`'s report."""

    out: Path
    kernels: int
    fused: list[str]
    kept: list[str]


class _Logits(nn.Module):
    """A causal language model as a function from token ids [batch, tokens] to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


def export_package(
    model: nn.Module, out: Path, example: Tensor | None = None, *, max_tokens: int = 512
) -> PackageReport:
    """Write `model` as the folder `out`, which must be absent or empty.

    example: the argument of a call; token ids [1, tokens] of a causal language model when None or integers. Its
    next-to-last dimension (of token ids, the last) may have 1 to `max_tokens` entries later. Raises RunError LB0574 for
    a model that is not on the CPU or without quantized layers, LB0575 when torch cannot export it; CheckpointError
    (LB0110) for an occupied folder; KernelError (LB0481) for a kernel no backend compiles.
    """
    wrapped, example = _callable(model, example)
    exported = _exported(wrapped, example, max_tokens)
    lowered, fused, kept = lower(exported.run_decompositions({}).module(check_guards=False))
    final = _exported(lowered, example, max_tokens)
    specs = kernels_of(final.graph)
    held = [*final.state_dict.values(), *final.constants.values()]
    size = sum(t.numel() * t.element_size() for t in held if isinstance(t, Tensor))
    with staged_folder(out, 2 * size + _ROOM) as stage:
        (stage / FOLDER).mkdir()
        kernels = compile_kernels(specs, host_target(), classes_up_to(max_tokens), stage / FOLDER)
        dtype = next((s.x_dtype for s in specs if isinstance(s, KernelSpec)), "f32")
        folder = KernelFolder(out, False, max_tokens, dtype, tuple(kernels))
        write_json(stage / MANIFEST, folder.manifest())
        write_json(stage / CALL, describe_call(example, _token_dim(example), max_tokens))
        torch._inductor.aoti_compile_and_package(final, package_path=str(stage / PACKAGE))
    return PackageReport(out, len(kernels), fused, kept)


def lower(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[str], list[str]]:
    """A graph in ATen, fused: (the graph, fusions taken, fusions not taken)."""
    imported = import_fx(gm)
    run_pipeline(imported.module, passes(), PassContext.create())
    fused, kept = decisions(imported)
    lowered = export_fx(imported)
    output = next(n for n in lowered.graph.nodes if n.op == "output")
    if isinstance(output.args[0], (tuple, list)) and len(output.args[0]) == 1:
        output.args = (output.args[0][0],)  # what was exported gave one tensor, and so does this
        lowered.recompile()
    return lowered, fused, kept


def kernels_of(graph: fx.Graph) -> list[KernelSpec | TableSpec]:
    """The kernels that an exported graph calls, each once, with the dtypes it calls them with."""
    specs: dict[KernelSpec | TableSpec, None] = {}
    for node in graph.nodes:
        if node.target is torch.ops.lowbit.linear.default:
            dtype = DTYPE_NAMES[value_of(node).dtype]
            specs[replace(parse_spec(str(node.args[4])), x_dtype=dtype, out_dtype=dtype)] = None
        elif node.target is torch.ops.lowbit.grouped_linear.default:
            dtype = DTYPE_NAMES[value_of(node).dtype]
            specs |= {replace(parse_spec(s), x_dtype=dtype, out_dtype=dtype): None for s in grouped_specs(node)}
        elif node.target is torch.ops.lowbit.embedding.default:
            specs[parse_table_spec(str(node.args[2]))] = None
    return list(specs)


def _callable(model: nn.Module, example: Tensor | None) -> tuple[nn.Module, Tensor]:
    """A module of one argument, prepared for the CPU's kernels, and an example of that argument."""
    layers = [m for m in model.modules() if isinstance(m, QuantLinear)]
    devices = {t.device.type for t in (*model.parameters(), *model.buffers())}
    if not layers or devices - {"cpu"}:
        what = f"it is on {', '.join(sorted(devices))}" if layers else "it has no quantized layers one by one"
        hint = "move it to the CPU" if layers else "call lowbit.quantize first, and lowbit.compile not at all"
        raise RunError("LB0574", f"only quantized models on the CPU are exported: {what}", hint=hint)
    for layer in layers:
        layer.prepare()
    prepare_experts(model)
    language = example is None or not example.is_floating_point()
    ids = torch.arange(1, 9)[None] if example is None else example
    return (_Logits(model).eval() if language else model.eval()), ids


def _token_dim(example: Tensor) -> int:
    """The dimension that counts tokens."""
    return example.dim() - (2 if example.is_floating_point() else 1)


def _exported(module: nn.Module, example: Tensor, max_tokens: int) -> torch.export.ExportedProgram:
    tokens = torch.export.Dim("tokens", min=1, max=max_tokens)
    shapes: Any = ({_token_dim(example): tokens},)
    try:
        with torch.no_grad():
            return torch.export.export(module, (example,), dynamic_shapes=shapes)
    except Exception as e:  # torch raises a dozen kinds; to the user they are one
        raise RunError("LB0575", f"torch.export cannot capture the model: {' '.join(str(e).split())[:400]}") from e
