"""Vector formats: text form, sizes, exact meaning, packing and storage."""

from __future__ import annotations

import math

import pytest
import torch

from lowbit.codegen.reference.backend import decode_weight
from lowbit.compiler.errors import FormatError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.quantizers.codebooks import to_levels
from lowbit.quantizers.formats import VectorFormat, parse_format, scalar_format
from lowbit.quantizers.vqtensor import VQTensor
from lowbit.quantizers.weights import (
    from_stored,
    pack_weights,
    random_weight,
    stored,
    stored_names,
    stored_shapes,
    unpack_weights,
)

FORMATS = [
    "vq.d4.k256",
    "vq.d8.k4096.r256",
    "vq.d6.k1024.c4.o2pv4k256",
    "vq.d8.k256.cn.bf16",
    "vq.d3.k16.rn.f32",
    "vq.d5.k65536.r512.o6v2k16.cn",
    "vq.d1.k4",
    "vq.d6.k1024.r16.c4.o2pv4k256.cn.s8",
    "vq.d12.k16.rn.s8",
    "vq.d2.k1024.r16.in.rn",
    "vq.d2.k16.in.cn.s8",
]
N, K = 50, 62


def weight(text: str, n: int = N, k: int = K, seed: int = 0) -> VQTensor:
    q = random_weight(parse_format(text), n, k, torch.Generator().manual_seed(seed))
    assert isinstance(q, VQTensor)
    return q


def naive(q: VQTensor) -> torch.Tensor:
    """Element by element, as the format is defined."""
    fmt, out, books = q.fmt, torch.zeros(q.n, q.k), []
    for name in ("centroids", "residual_centroids", "outlier_centroids"):
        book, scale = getattr(q, name), getattr(q, f"{name.removeprefix('residual_')}_scale")
        books.append(None if book is None else book.float())
        if book is not None and scale is not None:
            books[-1] *= scale.reshape([-1] + [1] * (book.ndim - 1))
    outliers, size = fmt.partition(q.k)
    for p in range(q.k):
        column = int(q.perm[p]) if q.perm is not None else p
        for row in range(q.n):
            if p < outliers:
                o = fmt.outliers
                value = books[2][q.outlier_indices[row // o.dim, p], row % o.dim]
            else:
                c = p - outliers
                at, lane = (
                    ((row, c // fmt.dim), c % fmt.dim) if fmt.axis == "in" else ((row // fmt.dim, c), row % fmt.dim)
                )
                value = books[0][c // size, q.indices[at], lane]
                if q.residual is not None:
                    value = value + books[1][c // size, q.residual[at], lane]
            if fmt.norm != "none":
                i = column if fmt.norm == "col" else row
                value = value * q.norm_scale[i].float() + q.norm_bias[i].float()
            out[row, column] = value
    return out


@pytest.mark.parametrize("text", FORMATS)
def test_text_form_round_trips(text: str) -> None:
    assert str(parse_format(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "vq",
        "vq.d4",
        "vq.d4.k100",
        "vq.d17.k256",
        "vq.d4.k256.r3",
        "vq.d4.k256.x",
        "vq.d4.k256.o0v4k16",
        "vq.d4.k131072",
        "vq.d4.k256.c2.in",
        "vq.d4.k256.o2v4k16.in",
    ],
)
def test_bad_formats_are_refused_with_advice(text: str) -> None:
    with pytest.raises(FormatError, match="LB021"):
        parse_format(text)


def test_a_vector_format_is_no_scalar_one() -> None:
    with pytest.raises(FormatError, match="one code per weight"):
        scalar_format("vq.d4.k256")


@pytest.mark.parametrize("text", FORMATS)
def test_dequantize_equals_the_definition(text: str) -> None:
    q = weight(text)
    assert torch.allclose(q.dequantize(), naive(q), atol=1e-6)


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("layout", ["vectors8", "vectors"])
def test_packed_decode_equals_dequantize(text: str, layout: str) -> None:
    fmt = parse_format(text)
    assert isinstance(fmt, VectorFormat)
    q = [weight(text, seed=seed) for seed in range(1 if fmt.ordered or fmt.norm == "col" else 2)]
    packed = pack_weights(q, LAYOUTS[layout])
    assert torch.equal(decode_weight(packed), torch.cat([t.dequantize() for t in q]))
    for back, original in zip(unpack_weights(packed), q, strict=True):
        assert torch.equal(back.dequantize(), original.dequantize())
        assert {n: t.dtype for n, t in stored(back).items()} == {n: t.dtype for n, t in stored(original).items()}


@pytest.mark.parametrize("text", [*FORMATS, "int2.g16.fz", "int3.g31.asym", "int8.ch.sym"])
def test_storage_round_trips_and_has_the_size_that_was_promised(text: str) -> None:
    fmt = parse_format(text)
    q = random_weight(fmt, N, K, torch.Generator().manual_seed(3))
    tensors = stored(q)
    assert {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()} == stored_shapes(fmt, N, K)
    assert tuple(tensors) == stored_names(fmt)
    assert torch.equal(from_stored(fmt, N, K, tensors).dequantize(), q.dequantize())
    if isinstance(fmt, VectorFormat):
        nbytes = sum(t.numel() * t.element_size() for n, t in tensors.items() if n != "weight_shape")
        assert math.isclose(fmt.bits_per_weight(N, K) * N * K, 8 * nbytes)


def test_siblings_with_an_order_of_their_own_are_not_stacked() -> None:
    q = weight("vq.d6.k1024.c4.o2pv4k256")
    with pytest.raises(FormatError, match="LB0223"):
        pack_weights([q, q], LAYOUTS["vectors"])


def test_tensors_that_lie_are_refused() -> None:
    q = weight("vq.d6.k1024.c4.o2pv4k256")
    tensors = stored(q)
    with pytest.raises(FormatError, match="LB0227"):
        from_stored(q.fmt, N, K, {**tensors, "perm": torch.zeros(K, dtype=torch.int16)})
    with pytest.raises(FormatError, match="LB0227"):
        from_stored(q.fmt, N, K, {n: t for n, t in tensors.items() if n != "centroids"})
    with pytest.raises(FormatError, match="LB0227"):
        from_stored(q.fmt, N, K, {**tensors, "outlier_indices": tensors["outlier_indices"] + 256})


def test_columns_that_are_no_whole_vectors_are_refused() -> None:
    q = weight("vq.d4.k256.in", k=64)
    with pytest.raises(FormatError, match=r"LB0227.*63 columns"):
        from_stored(q.fmt, N, 63, stored(q))


def test_an_order_of_more_columns_than_16_bits_count_is_refused() -> None:
    parse_format("vq.d4.k256").check(8, 70000, "layer")
    with pytest.raises(FormatError, match=r"LB0213 layer.*16 bits"):
        parse_format("vq.d4.k256.c2").check(8, 70000, "layer")


def test_scales_that_are_not_numbers_are_refused() -> None:
    q = random_weight(parse_format("mxfp4"), 4, 64, torch.Generator().manual_seed(0))
    scale = stored(q)["weight_scale"].view(torch.uint8).clone()
    scale[1, 0] = 255
    with pytest.raises(FormatError, match="LB0227"):
        from_stored(q.fmt, 4, 64, {**stored(q), "weight_scale": scale.view(torch.float8_e8m0fnu)})


@pytest.mark.parametrize("text", ["vq.d4.k256.c5", "vq.d16.k256", "vq.d4.k16.o62v4k16", "vq.d4.k16.in"])
def test_shapes_that_do_not_fit_are_refused(text: str) -> None:
    with pytest.raises(FormatError, match="LB0213"):
        parse_format(text).check(8, K, "layer")


def test_bits_count_every_overhead() -> None:
    assert parse_format("vq.d4.k256").bits_per_weight(576, 576) == 2 + 256 * 4 * 16 / 576**2
    bits = parse_format("vq.d8.k256.r256.cn").bits_per_weight(512, 1024)
    assert bits == 2 + (2 * 256 * 8 * 16 + 2 * 1024 * 16) / (512 * 1024)
    bits = parse_format("vq.d8.k256.r256.cn.s8").bits_per_weight(512, 1024)
    assert bits == 2 + (2 * 256 * 8 * 8 + 32 + 2 * 1024 * 16) / (512 * 1024)


def test_bytes_are_packed_as_bytes_for_cpus_and_as_their_values_elsewhere() -> None:
    q = weight("vq.d6.k16.s8")
    near, far = (pack_weights([q], LAYOUTS[name]).tensors for name in ("vectors8", "vectors"))
    assert near["book"].dtype == torch.uint8
    assert torch.equal(near["book"][0, 0, :, :6].int() - 128, q.centroids[0].int())
    assert near["book"].shape[-1] == 8
    assert bool((near["book"][..., 6:] == 128).all())
    assert torch.equal(far["book"][0, 0], q.centroids[0].float() * q.centroids_scale)


def test_residual_bytes_are_packed_so_that_sums_of_bytes_are_what_is_multiplied() -> None:
    q = weight("vq.d6.k16.r16.s8")
    assert q.residual_centroids is not None
    near = pack_weights([q], LAYOUTS["vectors8"]).tensors
    sums = near["book"][0, 0, :, None] + near["residual_book"][0, 0]  # modulo 256
    want = q.centroids[0, :, None].int() + q.residual_centroids[0].int()
    assert torch.equal(sums[..., :6].int() - 128, want)
    assert int(want.min()) < -110
    assert int(want.max()) > 110
    assert bool((sums[..., 6:] == 128).all())
    assert not any("residual" in name and name.endswith("scale") for name in near)


def test_books_that_have_a_scale_each_are_refused() -> None:
    """As they were stored before they shared one: each book used all levels."""
    q = weight("vq.d8.k256.r256.s8")
    books = [torch.randn(1, 256, 8, generator=torch.Generator().manual_seed(i)) * 0.02 for i in range(2)]
    (main,), scale = to_levels(books[:1])
    (rest,), _ = to_levels(books[1:])
    tensors = {**stored(q), "centroids": main, "centroids_scale": scale, "residual_centroids": rest}
    with pytest.raises(FormatError, match=r"LB0226.*signed bytes"):
        from_stored(q.fmt, N, K, tensors)
    (main, rest), scale = to_levels(books)
    tensors |= {"centroids": main, "centroids_scale": scale, "residual_centroids": rest}
    assert isinstance(from_stored(q.fmt, N, K, tensors), VQTensor)


def test_bytes_whose_sums_are_none_are_refused() -> None:
    q = weight("vq.d6.k16.r16.s8")
    tensors = stored(q)
    for level in (127, -128):
        with pytest.raises(FormatError, match=r"LB0226.*signed bytes"):
            from_stored(q.fmt, N, K, {**tensors, "residual_centroids": torch.full_like(q.residual_centroids, level)})
