"""Quantized embedding tables: rows are the oracle's, a tied output layer shares the bytes, all ways to run use them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from _models import swap_linears, tiny_llama
from torch import nn

from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.codegen.reference.table import gather_rows
from lowbit.compiler.errors import KernelError, RunError
from lowbit.compiler.frontend.trace import import_model
from lowbit.compiler.io.load import load_quantized, save_quantized
from lowbit.compiler.ir.graph import Embedding, Linear
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.types import QType
from lowbit.compiler.runtime.embedding import QuantEmbedding, quantize_embedding, quantize_head
from lowbit.compiler.runtime.modules import PackedLinear, QuantLinear
from lowbit.compiler.runtime.program.engine import DecoderProgram
from lowbit.compiler.runtime.program.parts import read_decoder
from lowbit.compiler.runtime.program.verify import verify_program
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.weights import pack_weights, random_weight


def _random(text: str, n: int = 80, k: int = 72) -> QTensor:
    q = random_weight(parse_format(text), n, k, torch.Generator().manual_seed(0))
    assert isinstance(q, QTensor)
    return q


IDS = torch.tensor([[0, 79, 3], [16, 15, 3]])


@pytest.mark.parametrize("layout", ["panel16", "whole16", "signs16", "words", "fragments"])
@pytest.mark.parametrize(
    "text", ["int3.g32.asym", "int8.ch.sym", "e2m3.t", "int4.g64.fz", "nvfp4", "int4.g32.sym.perm"]
)
def test_rows_are_the_oracles_in_every_layout(text: str, layout: str) -> None:
    q = _random(text)
    rows = gather_rows(pack_weights([q], LAYOUTS[layout]), IDS.flatten())
    assert torch.equal(rows, q.dequantize()[IDS.flatten()])


@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("text", ["int3.g32.asym", "int6.g64.fz"])
def test_the_kernel_gives_the_oracles_numbers(text: str) -> None:
    q = _random(text)
    panel = LAYOUTS["panel16"]
    packed = PackedLinear(pack_weights([q], panel), "float", ())
    table = QuantEmbedding(packed, torch.bfloat16)
    assert torch.equal(table(IDS), q.dequantize()[IDS].bfloat16())
    assert torch.equal(table.state_dict()["weight"], q.dequantize().bfloat16())
    with pytest.raises(KernelError, match=r"LB0432.*80"):
        table(torch.tensor([3, 80]))
    with pytest.raises(KernelError, match="LB0431"):
        QuantEmbedding(PackedLinear(pack_weights([_random("int4.g32.sym.perm")], panel), "float", ()), torch.float32)


def _tied() -> tuple[nn.Module, nn.Module]:
    """(a quantized model with a quantized table, the same with the table's numbers as a dense one)."""
    model = swap_linears(tiny_llama(tie_word_embeddings=True), "int4.g32.sym")
    quantize_embedding(model, "int8.ch.sym")
    dense = swap_linears(tiny_llama(), "int4.g32.sym")
    for layer in (dense.model.embed_tokens, dense.lm_head):
        layer.weight.data = model.state_dict()["model.embed_tokens.weight"].clone()
    return model, dense


@torch.no_grad()
def test_a_tied_output_layer_reads_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    model, dense = _tied()
    table, head = model.model.embed_tokens, model.lm_head
    assert isinstance(head, QuantLinear)
    assert table.packed is head.inner
    assert sum(b.numel() for b in model.buffers() if b.numel() >= 80 * 64) == 80 * 64
    want = dense(IDS).logits
    assert torch.allclose(model(IDS).logits, want, atol=1e-4)
    ops = list(import_model(model).walk())
    (lookup,) = [op for op in ops if isinstance(op, Embedding)]
    assert isinstance(lookup.args_[1].type, QType)
    assert [op for op in ops if isinstance(op, Linear) and op.args_[1] is lookup.args_[1]]
    compiled = torch.compile(model, backend="lowbit", fullgraph=True, options={"rest": "eager"})
    assert torch.allclose(compiled(IDS).logits, want, atol=1e-4)
    torch._dynamo.reset()
    with pytest.raises(RunError, match=r"LB0578.*QuantEmbedding"):
        quantize_embedding(model, "int8.ch.sym")


@torch.no_grad()
@pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")
def test_programs_read_the_packed_table() -> None:
    model = quantize_embedding(tiny_llama(tie_word_embeddings=True, num_hidden_layers=1), "int8.ch.sym").eval()
    parts = read_decoder(model, 32, "f32")
    assert parts.embedding is parts.head.packed
    assert parts.embedding is not None
    program = DecoderProgram(parts, max_tokens=1, context=32)
    assert verify_program(program, model, prompt=1, steps=4) < 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_an_output_layer_alone(tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits are those of the rounded layer, the table stays, and a checkpoint holds both."""
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    model = swap_linears(tiny_llama(num_hidden_layers=1, tie_word_embeddings=tied), "int4.g32.sym")
    table, dense = model.get_input_embeddings().weight, model.get_output_embeddings()
    model.set_output_embeddings(nn.Linear(dense.in_features, dense.out_features, bias=False))
    model.get_output_embeddings().weight = table if tied else dense.weight
    before = table.detach().clone()
    assert quantize_head(model) is model
    head = model.get_output_embeddings()
    assert isinstance(head, QuantLinear)
    assert str(head.fmt) == "int8.ch.sym"
    assert quantize_head(model).get_output_embeddings() is head  # it is there already
    assert torch.equal(model.get_input_embeddings().weight, before)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        want = model(ids).logits
        again = load_quantized(save_quantized(model, tmp_path / "out"))
        assert torch.allclose(again(ids).logits, want, atol=1e-4 * want.abs().max())
    assert torch.equal(again.get_input_embeddings().weight.float(), before)
    assert isinstance(again.get_output_embeddings(), QuantLinear)
    with pytest.raises(RunError, match="LB0567"):
        quantize_head(model, "int4.g32.sym")
    with pytest.raises(RunError, match="LB0567"):
        quantize_head(nn.Sequential(nn.Linear(4, 4)))
