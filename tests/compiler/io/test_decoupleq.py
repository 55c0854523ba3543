"""Reading decoupleQ's saved integers, scales and offsets."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _models import dequantized, tiny_llama
from torch import nn

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io.checkpoint import read_checkpoint
from lowbit.compiler.io.decoupleq import convert, read
from lowbit.compiler.io.load import load_quantized
from lowbit.quantizers.formats import parse_format

IDS = torch.arange(10)[None]


def layer(n: int, k: int, groups: int, bits: int, seed: int = 0, *, zero: bool = True) -> dict[str, torch.Tensor]:
    """What decoupleQ saves of one layer: int8 numbers, float32 scales and offsets."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (n, k), generator=rng).to(torch.int8)
    codes[0, 0] = 2 ** (bits - 1) - 1  # every width is really used
    side = {"weight_qscale": torch.rand(n, groups, generator=rng) * 0.1 + 0.01}
    if zero:
        side["weight_qzero"] = torch.randn(n, groups, generator=rng) * 0.1
    return {"weight": codes, **side}


def dense(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    n, k = tensors["weight"].shape
    grouped = tensors["weight"].float().reshape(n, tensors["weight_qscale"].shape[1], -1)
    out = grouped * tensors["weight_qscale"][..., None]
    if "weight_qzero" in tensors:
        out = out + tensors["weight_qzero"][..., None]
    return out.reshape(n, k)


def save(path: Path, **layers: dict[str, torch.Tensor]) -> Path:
    torch.save({f"{name}.{part}": t for name, tensors in layers.items() for part, t in tensors.items()}, path)
    return path


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("groups", [1, 4])
def test_bits_and_groups_are_inferred(bits: int, groups: int, tmp_path: Path) -> None:
    tensors = layer(12, 64, groups, bits)
    (q,) = read(save(tmp_path / "true_quant.pth", a=tensors)).values()
    assert q.fmt == parse_format(f"int{bits}.{'g16' if groups > 1 else 'ch'}.fz.f32")
    assert torch.equal(q.dequantize(), dense(tensors))


def test_all_layers_get_the_bits_of_the_widest(tmp_path: Path) -> None:
    narrow, wide = layer(8, 16, 2, 2), layer(8, 32, 4, 3, zero=False)
    weights = read(save(tmp_path / "q.pth", narrow=narrow, wide=wide))
    assert {name: str(q.fmt) for name, q in weights.items()} == {"narrow": "int3.g8.fz.f32", "wide": "int3.g8.sym.f32"}
    for name, tensors in (("narrow", narrow), ("wide", wide)):
        assert torch.equal(weights[name].dequantize(), dense(tensors))
    half = read(save(tmp_path / "h.pth", narrow=narrow), bits=4, scale="f16")["narrow"]
    assert str(half.fmt) == "int4.g8.fz"
    rounded = {name: t.half().float() if t.is_floating_point() else t for name, t in narrow.items()}
    assert torch.equal(half.dequantize(), dense(rounded))


def test_a_file_becomes_a_checkpoint(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state["model.norm.weight"] += 0.5  # decoupleQ may train norms
    for path, old in list(model.named_modules()):
        if isinstance(old, nn.Linear) and path != "lm_head":
            tensors = layer(old.out_features, old.in_features, old.in_features // 16, 2)
            old.weight.data = dense(tensors)
            state |= {f"{path}.{part}": t for part, t in tensors.items()}
    model.model.norm.weight.data += 0.5
    torch.save(state, tmp_path / "true_quant.pth")
    out = convert(tmp_path / "true_quant.pth", tmp_path / "base", tmp_path / "out")
    assert set(map(str, read_checkpoint(out).modules.values())) == {"int2.g16.fz.f32"}
    loaded = load_quantized(out)
    with torch.no_grad():
        expected = model(IDS).logits
        got = loaded(IDS).logits
        exact = dequantized(loaded)(IDS).logits
    assert torch.equal(exact, expected)
    assert (got - expected).abs().max() <= 1e-3 * expected.abs().max()


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return (Path.touch, (Path("harm.txt"),))


def test_files_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a.weight_qscale": Harmful()}, "torch.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Harmful()))
    for name in ("torch.pth", "plain.pth"):
        with pytest.raises(CheckpointError, match="LB0119"):
            read(name)
    assert not (tmp_path / "harm.txt").exists()


DAMAGE: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "no numbers": lambda t: t.pop("weight"),
    "no scales": lambda t: t.pop("weight_qscale"),
    "numbers are floats": lambda t: t.update(weight=t["weight"].float()),
    "a vector": lambda t: t.update(weight=t["weight"][0]),
    "groups do not divide": lambda t: t.update(weight_qscale=t["weight_qscale"][:, :3]),
    "no groups": lambda t: t.update(weight_qscale=t["weight_qscale"][:, :0]),
    "rows missing": lambda t: t.update(weight_qscale=t["weight_qscale"][1:]),
    "scales are integers": lambda t: t.update(weight_qscale=t["weight_qscale"].int()),
    "offsets of another shape": lambda t: t.update(weight_qzero=t["weight_qzero"][:, :1]),
    "offsets are integers": lambda t: t.update(weight_qzero=t["weight_qzero"].int()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_contradictions_are_refused(name: str, tmp_path: Path) -> None:
    tensors = layer(8, 16, 4, 2)
    DAMAGE[name](tensors)
    with pytest.raises(CheckpointError, match="LB0119"):
        read(save(tmp_path / "q.pth", a=tensors))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="LB0101"):
        read(tmp_path / "absent.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    whole = save(tmp_path / "whole.pth", a=layer(8, 16, 4, 2))
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:-200])
    for name in ("list", "text", "empty", "cut"):
        with pytest.raises(CheckpointError, match="LB0119"):
            read(tmp_path / f"{name}.pth")
    for bits in (1, 9):
        with pytest.raises(CheckpointError, match="LB0119"):
            read(whole, bits=bits)
    with pytest.raises(CheckpointError, match=r"LB0119 .*of 3 bits"):
        read(save(tmp_path / "three.pth", a=layer(8, 16, 4, 3)), bits=2)
