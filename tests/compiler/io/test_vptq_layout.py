"""VPTQ's layout, one layer at a time: its bits, every way of storing a layer, and files that lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from _vptq import PATH, folder_of, random_vq, read_one, same, settings_of, unpacked
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.io import vptq
from lowbit.compiler.io.checkpoint import export_layout, read_checkpoint
from lowbit.compiler.io.vptq_tensors import tensor_shapes, to_tensors, to_vqtensor
from lowbit.quantizers.formats import Outliers, VectorFormat, parse_format
from lowbit.quantizers.vqtensor import VQTensor

GOLDEN = [
    ("vq.d4.k4096", [4095, 1, 2048, 77, 3000, 15, 256, 4094], None, [0x00001FFF, 0xFBB804D8, 0xFFE10000]),
    ("vq.d4.k65536.r256", [65535, 1, 32768, 4660], [255, 0, 128, 18], [0x01FFFFFF, 0x80000000, 0x12123480]),
]


@pytest.mark.parametrize(("text", "indices", "residual", "words"), GOLDEN)
def test_bits_are_those_of_vptqs_packer(
    text: str, indices: list[int], residual: list[int] | None, words: list[int]
) -> None:
    fmt = parse_format(text)
    assert isinstance(fmt, VectorFormat)
    zeros = {"centroids": torch.zeros(1, fmt.centroids, 4, dtype=torch.float16)}
    rest = None
    if residual:
        zeros["residual_centroids"] = torch.zeros(1, fmt.residual, 4, dtype=torch.float16)
        rest = torch.tensor([residual], dtype=torch.int32)
    q = VQTensor(fmt, 4, len(indices), torch.tensor([indices], dtype=torch.int32), residual=rest, **zeros)
    stored = to_tensors(q)["indices"]
    assert [w & 0xFFFFFFFF for w in stored.flatten().tolist()] == words
    assert same(to_vqtensor(vptq.VPTQLayer(fmt, 4, len(indices)), to_tensors(q), "m"), q)


def slow_dense(tensors: dict[str, torch.Tensor], layer: dict[str, Any]) -> torch.Tensor:
    """The matrix as VPTQ defines it, one number and one bit at a time."""
    n, k, size = (layer[key] for key in ("out_features", "in_features", "group_size"))
    first = layer["outlier_size"]
    (_, v), (_, c), (_, r) = (layer[key] for key in ("vector_lens", "num_centroids", "num_res_centroids"))
    ib, rb = c.bit_length() - 1, r.bit_length() - 1 if r > 0 else 0
    perm = (tensors["perm"].long() & 0xFFFF).tolist() if layer["enable_perm"] else list(range(k))
    out = torch.zeros(n, k)
    for position in range(k):
        group, column = divmod(position - first, size)
        for row in range(n):
            if position < first:
                o = layer["vector_lens"][0]
                index = int(tensors["outlier_indices"][0, row // o, position]) & 0xFFFF
                value = float(tensors["outlier_centroids.weight"][0, index * o + row % o])
            else:
                stream = [int(w) & 0xFFFFFFFF for w in tensors["indices"][group, row // v]]
                bits = [stream[s // 32] >> (s % 32) & 1 for s in range(column * (ib + rb), (column + 1) * (ib + rb))]
                code = sum(bit << i for i, bit in enumerate(bits))
                main, rest = code & (2**ib - 1), code >> ib
                value = float(tensors["centroids.weight"][group, main * v + row % v])
                if rb:
                    value += float(tensors["res_centroids.weight"][group, rest * v + row % v])
            if layer["enable_norm"]:
                scale, bias = (tensors[name][perm[position]] for name in ("weight_scale", "weight_bias"))
                value = value * float(scale) + float(bias)
            out[row, perm[position]] = value
    return out


@pytest.mark.parametrize(
    ("text", "n", "k"),
    [
        ("vq.d4.k16", 10, 9),
        ("vq.d3.k8.r4.cn", 7, 11),
        ("vq.d4.k8.r8.c3.o3v2k4.cn.f32", 9, 15),
        ("vq.d2.k64.c2.o20pv3k32.bf16", 7, 13),
    ],
)
def test_tensors_mean_what_vptq_means(text: str, n: int, k: int) -> None:
    q = random_vq(text, n, k)
    torch.testing.assert_close(slow_dense(to_tensors(q), settings_of(q)), q.dequantize(), rtol=0, atol=1e-6)


@st.composite
def layers(draw: st.DrawFn) -> tuple[VectorFormat, int, int]:
    books = st.integers(1, 12).map(lambda bits: 2**bits)
    groups = draw(st.integers(1, 4))
    outliers = None
    if draw(st.booleans()):
        count = draw(st.integers(0, 5))
        amount = {"count": count} if count else {"percent": draw(st.integers(1, 40))}
        outliers = Outliers(draw(st.integers(1, 8)), draw(books), **amount)
    fmt = VectorFormat(
        draw(st.integers(1, 16)),
        draw(books),
        draw(st.just(0) | books),
        groups,
        outliers,
        draw(st.sampled_from(["none", "col", "row"])),
        draw(st.sampled_from(["f16", "bf16", "f32"])),
    )
    k = draw(st.integers(1, 20)) * groups + (outliers.count if outliers else 0)
    k += 20 * groups if outliers and outliers.percent else 0
    return fmt, draw(st.integers(1, 40)), k


@settings(max_examples=80, deadline=None)
@given(layers(), st.integers(0, 10**6))
def test_round_trip_is_bit_exact(case: tuple[VectorFormat, int, int], seed: int) -> None:
    """Also for layers the vptq package could not unpack: short rows, wide residuals, row norms."""
    fmt, n, k = case
    q = random_vq(fmt, n, k, seed)
    tensors = to_tensors(q)
    expected = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    assert expected == tensor_shapes(fmt, n, k)
    layer = vptq.VPTQLayer(vptq.exact_format(fmt, k), n, k, permuted=fmt.ordered)  # type: ignore[arg-type]
    assert same(to_vqtensor(layer, tensors, "m"), q)


@pytest.mark.parametrize("dtype", [torch.int16, torch.uint16, torch.float16])
@pytest.mark.parametrize("text", ["vq.d8.k65536.r65536", "vq.d6.k64.c2.o2v4k16.cn", "vq.d4.k4096.r16.c3"])
def test_unpacked_files(text: str, dtype: torch.dtype, tmp_path: Path) -> None:
    q = random_vq(text, 50, 20 if ".o2" in text else 24)
    layer = settings_of(q, is_indice_packed=False, indices_as_float=dtype == torch.float16)
    assert same(read_one(folder_of(tmp_path, unpacked(q, dtype), layer)), q)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("text", ["vq.d4.k16", "vq.d8.k256.r64.cn"])
def test_order_of_one_group_is_absorbed(text: str, packed: bool, tmp_path: Path) -> None:
    """Columns in an order of their own, as VPTQ stores every layer, mean the same with the order taken back."""
    q = random_vq(text, 24, 40)
    perm = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    rest = None if q.residual is None else q.residual[:, perm]
    norms = {"norm_scale": q.norm_scale, "norm_bias": q.norm_bias}
    moved = VQTensor(q.fmt, 24, 40, q.indices[:, perm], q.centroids, rest, q.residual_centroids, **norms)
    tensors = to_tensors(moved) if packed else unpacked(moved, torch.int16)
    tensors["perm"] = perm.to(torch.int16) if packed else perm
    layer = settings_of(q, enable_perm=True, is_indice_packed=packed)
    assert same(read_one(folder_of(tmp_path, tensors, layer)), q)


def test_row_norms_and_groups_without_order(tmp_path: Path) -> None:
    q = random_vq("vq.d4.k16.rn", 24, 40)
    assert same(read_one(folder_of(tmp_path, to_tensors(q), settings_of(q, enable_norm=True, norm_dim=1))), q)
    q = random_vq("vq.d4.k16.c2", 24, 40)
    tensors = to_tensors(q)
    del tensors["perm"]
    got = read_one(folder_of(tmp_path, tensors, settings_of(q, enable_perm=False)))
    assert torch.equal(got.indices, q.indices)
    assert got.perm is not None
    assert torch.equal(got.perm, torch.arange(40))


def test_codebooks_of_several_types_are_widened(tmp_path: Path) -> None:
    q = random_vq("vq.d4.k16.r16", 24, 40)
    tensors = to_tensors(q)
    tensors["res_centroids.weight"] = tensors["res_centroids.weight"].to(torch.bfloat16)
    got = read_one(folder_of(tmp_path, tensors, settings_of(q)))
    assert got.fmt == parse_format("vq.d4.k16.r16.f32")
    assert torch.equal(got.centroids, q.centroids.float())


def test_settings_are_found_by_path_then_by_name(tmp_path: Path) -> None:
    q = random_vq("vq.d4.k16", 24, 40)
    wrong = settings_of(q, vector_lens=[-1, 8])
    alone = folder_of(
        tmp_path / "a", to_tensors(q), {}, config_for_layers={}, shared_layer_config={"q_proj": settings_of(q)}
    )
    both = folder_of(tmp_path / "b", to_tensors(q), settings_of(q), shared_layer_config={"q_proj": wrong})
    other = folder_of(tmp_path / "c", to_tensors(q), {}, config_for_layers={}, shared_layer_config={"k_proj": wrong})
    assert same(read_one(alone), q)
    assert same(read_one(both), q)
    with pytest.raises(CheckpointError, match=r"LB0114 .*no settings"):
        read_checkpoint(other)


def test_an_outlier_codebook_without_outliers_is_left_out(tmp_path: Path) -> None:
    q = random_vq("vq.d4.k16", 24, 40)
    empty = {"outlier_indices": torch.zeros(1, 6, 0, dtype=torch.int16), "outlier_centroids.weight": torch.zeros(1, 64)}
    tensors = {**to_tensors(q), **{name: t.half() if t.is_floating_point() else t for name, t in empty.items()}}
    layer = settings_of(q, vector_lens=[4, 4], num_centroids=[16, 16])
    folder = folder_of(tmp_path, tensors, layer)
    assert same(read_one(folder), q)
    assert read_checkpoint(folder).plain_names() == []


def test_which_formats_go_where() -> None:
    shape = (64, 64)
    for text in ("vq.d4.k256", "vq.d8.k65536.r65536", "vq.d6.k64.c4.cn", "vq.d4.k16.o2pv4k32", "vq.d4.k2.bf16"):
        assert export_layout(parse_format(text), *shape) == "vptq"
    for text, reason in {
        "vq.d4.k256.rn": "output rows", "vq.d4.k16.r32": "width", "vq.d4.k16.o4v1k16": "one element",
        "vq.d4.k2.c4": "17 bits", "int4.g32.sym": "vector formats", "vq.d4.k256.s8": "bytes",
        "vq.d4.k256.in": "along the inputs",
    }.items():  # fmt: skip
        assert reason in str(vptq.can_express(parse_format(text), *shape))
    assert export_layout(parse_format("vq.d4.k256.rn"), *shape) == "lowbit"
    assert export_layout(parse_format("vq.d4.k256.s8"), *shape) == "lowbit"
    assert export_layout(parse_format("int2.g64.fz"), *shape) == "lowbit"
    assert vptq.can_express(parse_format("vq.d4.k2"), 64, 17) is None
    assert vptq.can_express(parse_format("vq.d4.k2"), 64, 16) is not None


Damage = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]

LIES: dict[str, tuple[str, Damage]] = {
    "out_features too large": ("LB0114", lambda c, t: c.update(out_features=2**30)),
    "out_features a text": ("LB0114", lambda c, t: c.update(out_features="48")),
    "in_features true": ("LB0114", lambda c, t: c.update(in_features=True)),
    "in_features negative": ("LB0114", lambda c, t: c.update(in_features=-40)),
    "in_features huge": ("LB0114", lambda c, t: c.update(in_features=10**30)),
    "groups do not add up": ("LB0114", lambda c, t: c.update(group_size=20)),
    "groups and columns lie together": ("LB0114", lambda c, t: c.update(group_size=2**20, in_features=2**21 + 4)),
    "no groups": ("LB0114", lambda c, t: c.update(group_num=0)),
    "outliers without a codebook": ("LB0118", lambda c, t: c.update(vector_lens=[-1, 4], num_centroids=[-1, 64])),
    "three vector lengths": ("LB0114", lambda c, t: c.update(vector_lens=[4, 4, 4])),
    "vector lengths a number": ("LB0114", lambda c, t: c.update(vector_lens=4)),
    "vectors of 32": ("LB0118", lambda c, t: c.update(vector_lens=[4, 32])),
    "not a power of two": ("LB0118", lambda c, t: c.update(num_centroids=[16, 60])),
    "codebook larger than stored": ("LB0114", lambda c, t: c.update(num_centroids=[16, 65536])),
    "a residual that is not stored": ("LB0114", lambda c, t: c.update(num_res_centroids=[-1, 16])),
    "outliers with residuals": ("LB0118", lambda c, t: c.update(num_res_centroids=[16, -1])),
    "vectors along the inputs": ("LB0118", lambda c, t: c.update(vector_quant_dim="in")),
    "norm of a third kind": ("LB0118", lambda c, t: c.update(norm_dim=2)),
    "row norms, stored for columns": ("LB0114", lambda c, t: c.update(norm_dim=1)),
    "no norm, but stored": ("LB0114", lambda c, t: c.update(enable_norm=False)),
    "no order, but stored": ("LB0114", lambda c, t: c.update(enable_perm=False)),
    "not packed": ("LB0114", lambda c, t: c.update(is_indice_packed=False)),
    "no indices": ("LB0114", lambda c, t: t.pop("indices")),
    "no codebook": ("LB0114", lambda c, t: t.pop("centroids.weight")),
    "no order": ("LB0114", lambda c, t: t.pop("perm")),
    "no scale": ("LB0114", lambda c, t: t.pop("weight_scale")),
    "indices are floats": ("LB0114", lambda c, t: t.update(indices=t["indices"].float())),
    "a word too few": ("LB0114", lambda c, t: t.update(indices=t["indices"][..., 1:])),
    "a row too many": ("LB0114", lambda c, t: t.update(indices=torch.cat([t["indices"]] * 2, 1))),
    "codebook of doubles": ("LB0118", lambda c, t: t.update({"centroids.weight": t["centroids.weight"].double()})),
    "codebook of integers": ("LB0118", lambda c, t: t.update({"centroids.weight": t["centroids.weight"].int()})),
}  # fmt: skip


def example() -> VQTensor:
    return random_vq("vq.d4.k64.c2.o4v4k16.cn", 48, 40)


@pytest.mark.parametrize("name", LIES)
def test_lies_are_refused_before_anything_is_read(name: str, tmp_path: Path) -> None:
    code, damage = LIES[name]
    q = example()
    config, tensors = settings_of(q), to_tensors(q)
    damage(config, tensors)
    with pytest.raises(CheckpointError, match=f"^{code} "):
        read_checkpoint(folder_of(tmp_path, tensors, config))


@pytest.mark.parametrize(
    "config",
    [
        {"config_for_layers": [1]},
        {"config_for_layers": {PATH: "x"}},
        {"shared_layer_config": 7},
        {"modules_to_not_convert": "lm_head"},
        {"modules_to_not_convert": [3]},
        {"modules_to_not_convert": [PATH]},
        {"modules_to_not_convert": ["q_proj"]},
        {"modules_to_not_convert": ["model.layers"]},
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    q = example()
    with pytest.raises(CheckpointError, match=r"^LB0114 "):
        read_checkpoint(folder_of(tmp_path, to_tensors(q), settings_of(q), **config))


def test_layers_that_are_kept_need_no_tensors(tmp_path: Path) -> None:
    q = example()
    config = {"config_for_layers": {PATH: settings_of(q), "lm_head": settings_of(q)}}
    with pytest.raises(CheckpointError, match=r"LB0114 .*lm_head"):
        read_checkpoint(folder_of(tmp_path, to_tensors(q), {}, **config))
    folder = folder_of(tmp_path, to_tensors(q), {}, **config, modules_to_not_convert=["lm_head"])
    assert list(read_checkpoint(folder).modules) == [PATH]


VALUES: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    "perm repeats": lambda t: t["perm"].fill_(3),
    "perm out of range": lambda t: t["perm"].__setitem__(0, -1),
    "outlier index out of range": lambda t: t["outlier_indices"].fill_(16),
    "negative outlier index": lambda t: t["outlier_indices"].fill_(-1),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_out_of_range_are_refused(name: str, tmp_path: Path) -> None:
    q = example()
    tensors = {key: value.clone() for key, value in to_tensors(q).items()}
    VALUES[name](tensors)
    with pytest.raises(CheckpointError, match=r"^LB0114 "):
        read_one(folder_of(tmp_path, tensors, settings_of(q)))


@pytest.mark.parametrize("name", ["indices", "res_indices"])
def test_unpacked_indices_out_of_range_are_refused(name: str, tmp_path: Path) -> None:
    q = random_vq("vq.d4.k64.r16", 48, 40)
    tensors = unpacked(q, torch.int16)
    tensors[name][0, 5, 7] = 64 if name == "indices" else 16
    with pytest.raises(CheckpointError, match=f"^LB0114 .*{name} points beyond"):
        read_one(folder_of(tmp_path, tensors, settings_of(q, is_indice_packed=False)))
