"""Writing GPTQ's layout: words against packing a bit at a time, what the reader makes of them, what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from _models import random_qtensor, tiny_llama
from safetensors.torch import save_file
from torch import Tensor, nn

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io import gptq, gptq_write
from lowbit.compiler.io.checkpoint import read_checkpoint
from lowbit.quantizers.formats import parse_format, scalar_format
from lowbit.quantizers.qtensor import QTensor


def words(rows: list[list[int]], bits: int) -> list[list[int]]:
    """Every row as one number, its first code in the lowest bits, cut into signed words of 32 bits."""
    out = []
    for row in rows:
        number = sum(code << bits * i for i, code in enumerate(row))
        cut = [number >> 32 * i & 0xFFFFFFFF for i in range(len(row) * bits // 32)]
        out.append([w - 2**32 if w >= 2**31 else w for w in cut])
    return out


def below(rows: list[list[int]], bits: int) -> list[list[int]]:
    """`words` of v1's zero points: a one for every code is subtracted from each word."""
    ones = words([[1] * len(rows[0])], bits)[0]
    lowered = [[(w - one) & 0xFFFFFFFF for w, one in zip(row, ones, strict=True)] for row in words(rows, bits)]
    return [[w - 2**32 if w >= 2**31 else w for w in row] for row in lowered]


def extreme(text: str, n: int, k: int) -> QTensor:
    """Random codes; zero points, where there are some, are 0, the largest, and everything between."""
    q = random_qtensor(text, n, k)
    if q.zero is not None:
        q.zero.copy_((torch.arange(q.zero.numel()).reshape(q.zero.shape) * 5 % 2**q.fmt.bits).to(torch.uint8))
        q.zero[0], q.zero[1] = 0, 2**q.fmt.bits - 1
    return q


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize(
    "text", [f"int{b}.{g}.{s}" for b in (2, 3, 4, 8) for g in ("g32", "ch") for s in ("sym", "asym")]
)
def test_words_and_what_the_reader_makes_of_them(text: str, offset: int) -> None:
    q = extreme(text, 32, 96)
    got, bits = gptq_write.to_tensors(q, offset), q.fmt.bits
    zero = q.zero if q.zero is not None else torch.full(q.scale.shape, 2 ** (bits - 1))
    columns, rows_of_zeros = words(q.codes.tolist(), bits), zero.t().tolist()
    assert got["qweight"].t().tolist() == columns
    assert got["qzeros"].tolist() == (below if offset else words)(rows_of_zeros, bits)
    assert got["g_idx"].tolist() == [j // (32 if ".g32." in text else 96) for j in range(96)]
    assert torch.equal(got["scales"], q.scale.t())
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in got.items()}
    assert shapes == gptq_write.tensor_shapes(q.fmt, 32, 96)
    kind = {"checkpoint_format": "gptq" if offset else "gptq_v2", "sym": q.zero is None}
    layout = gptq.layout({"bits": bits, "group_size": q.fmt.granularity.group or -1, **kind}, "x")
    again = gptq.to_qtensor(layout, q.fmt, got, "x")
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(again.scale, q.scale)
    assert q.zero is None if again.zero is None else torch.equal(again.zero, q.zero)


@pytest.mark.parametrize("text", ["int4.g32.sym", "int3.g16.asym"])
def test_columns_in_an_order(text: str) -> None:
    """Columns are written where the matrix has them; read again, those of a group come in the matrix's order."""
    q = random_qtensor(text, 32, 96).in_order(torch.randperm(96, generator=torch.Generator().manual_seed(0)))
    got, bits, group = gptq_write.to_tensors(q), q.fmt.bits, q.fmt.granularity.group
    assert q.perm is not None
    assert got["g_idx"][q.perm.long()].tolist() == [i // group for i in range(96)]
    config = gptq_write.quantization_config({"m": q.fmt, "n": replace(q.fmt, ordered=False)}, [], "")
    assert config["desc_act"] is True
    again = gptq.to_qtensor(gptq.layout(config, "x"), q.fmt, got, "x")
    assert torch.equal(again.dequantize(), q.dequantize())
    assert again.perm is not None
    assert all(part.tolist() == sorted(part.tolist()) for part in again.perm.split(group))
    assert all(torch.equal(gptq_write.to_tensors(again)[name], got[name]) for name in got)
    assert bits == config["bits"]


def test_symmetric_words_are_those_of_every_gptq_file() -> None:
    zeros = gptq_write.to_tensors(random_qtensor("int4.g32.sym", 16, 64))["qzeros"]
    assert zeros.unique().tolist() == [0x77777777]


VERSIONS = {"int4.g32.sym": "gptq", "int2.ch.sym": "gptq", "int8.ch.sym": "gptq", "int3.g32.sym": "gptq_v2",
            "int4.g32.asym": "gptq_v2", "int3.ch.asym": "gptq_v2"}  # fmt: skip


@pytest.mark.parametrize("text", VERSIONS)
def test_config(text: str) -> None:
    fmt = scalar_format(text)
    config = gptq_write.quantization_config({"a.b": fmt, "lm_head": fmt}, [], "lm_head")
    assert config["checkpoint_format"] == config["format"] == VERSIONS[text]
    assert config["sym"] == (".sym" in text)
    assert config["group_size"] == (32 if ".g32" in text else -1)
    assert config["lm_head"] is True
    assert "dynamic" not in config
    found = gptq.layout(config, "x")
    assert (found.bits, found.symmetric, found.zero_offset) == (fmt.bits, not fmt.zero, VERSIONS[text] == "gptq")


def test_what_is_kept_is_excluded_by_pattern() -> None:
    kept = ["m.0.mlp.down_proj", "m.1.attn.q_proj", "m.1.attn.k_proj", "m.1.attn.v_proj", "m.2.attn.q_proj"]
    config = gptq_write.quantization_config({"m.2.mlp.down_proj": scalar_format("int4.g32.sym")}, kept, "lm_head")
    patterns = [key.removeprefix("-:") for key in config["dynamic"]]
    excluded = {p for p in [*kept, "m.1.attn.qkv_proj"] if any(re.match(pattern, p) for pattern in patterns)}
    assert excluded == {*kept, "m.1.attn.qkv_proj"}  # the last is what vLLM makes of three that are kept
    others = [
        "m.2.mlp.down_proj",
        "m.2.attn.qkv_proj",
        "m.10.mlp.down_proj",
        "m.0.mlp.down_projx",
        "xm.0.mlp.down_proj",
    ]
    assert not any(re.match(pattern, other) for pattern in patterns for other in others)
    assert config["lm_head"] is False
    assert len(gptq.layout(config, "x").excluded) == 6


REFUSED = {
    "vq.d4.k256": "one code per weight",
    "bcq2.g32": "no sums",
    "tcq2.g32": "integers, not tcq2",
    "e4m3.ch": "integers, not e4m3",
    "nf4.g32": "integers, not nf4",
    "int5.g32.sym": "not 5",
    "int1.g32.sym": "not 1",
    "int4.g32.fz": "integer zero points",
    "int4.g32.sym.i8ch": "product of two",
    "int4.t.sym": "per channel or per group",
    "int4.g32.asym.bf16": "float16, not bf16: .* with int4.g32.asym$",
    "int4.g48.sym": "groups of 48 do not divide 64 columns",
}


@pytest.mark.parametrize("text", REFUSED)
def test_formats_it_cannot_hold(text: str) -> None:
    why = gptq_write.can_express(parse_format(text), 32, 64)
    assert why is not None
    assert re.search(REFUSED[text], why)


def test_sizes_it_cannot_hold() -> None:
    fmt = scalar_format("int3.ch.sym")
    assert gptq_write.can_express(fmt, 32, 64) is None
    assert "24 rows of 3 bits" in str(gptq_write.can_express(fmt, 24, 64))
    assert "40 columns of 3 bits" in str(gptq_write.can_express(fmt, 32, 40))


def checkpoint(folder: Path, dynamic: object) -> Path:
    """A tiny Llama in GPTQ's layout whose last down_proj is not quantized."""
    model, fmt = tiny_llama(), scalar_format("int4.g32.sym")
    state: dict[str, Tensor] = {name: t.clone() for name, t in model.state_dict().items()}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and path not in ("lm_head", "model.layers.1.mlp.down_proj"):
            q = random_qtensor(fmt, *state.pop(f"{path}.weight").shape)
            state |= {f"{path}.{name}": t for name, t in gptq_write.to_tensors(q).items()}
    config = {**gptq_write.quantization_config({"x": fmt}, [], "lm_head"), "dynamic": dynamic}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**model.config.to_dict(), "quantization_config": config}))
    return folder


@pytest.mark.parametrize("pattern", [r"-:^model\.layers\.1\.mlp\.down_proj$", r"-:.*\.1\.mlp\.down", "-:lm_head"])
def test_modules_may_be_excluded(pattern: str, tmp_path: Path) -> None:
    found = read_checkpoint(checkpoint(tmp_path, {pattern: {}}))
    assert len(found.modules) == 13
    assert "model.layers.1.mlp.down_proj.weight" in found.plain_names()


BAD_DYNAMIC = {
    "quantized after all": ({r"-:.*\.0\.mlp\.": {}}, "has a qweight"),
    "positive": ({"+:.*": {"bits": 8}}, "settings by module"),
    "positive without a sign": ({".*": {"bits": 8}}, "settings by module"),
    "not an object": (["-:x"], "must be an object"),
    "not a pattern": ({"-:(": {}}, "cannot be read"),
    "never ends": ({"-:(a+)+$": {}}, "too long"),
    "never ends, in a count": ({"-:(a|aa){60}$": {}}, "too long"),
    "many repetitions": ({"-:.*.*.*.*x": {}}, "too long"),
    "a long one": ({"-:" + "a" * 501: {}}, "too long"),
    "a number that is too large": ({"-:a{99999999999999999999}": {}}, "cannot be read"),
}


@pytest.mark.parametrize("name", BAD_DYNAMIC)
def test_exclusions_that_are_refused(name: str, tmp_path: Path) -> None:
    dynamic, why = BAD_DYNAMIC[name]
    with pytest.raises(CheckpointError, match=f"LB0113.*{why}"):
        read_checkpoint(checkpoint(tmp_path, dynamic))
