"""The closed form of scales and offsets, rounding with offsets, and feedback inside the box."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.compiler.errors import RunError
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.factor import prepare
from lowbit.quantizers.formats import scalar_format
from lowbit.quantizers.methods import Gptq, Rtn, proxy_error
from lowbit.quantizers.methods.base import row_errors
from lowbit.quantizers.methods.box import BoxSystems, _Relaxation, box_feedback
from lowbit.quantizers.methods.fit import best_sides, refit_scales
from lowbit.quantizers.methods.grid import Grid, search_grid
from lowbit.quantizers.methods.sweep import ColumnGrid, feedback


def inputs_of(k: int, tokens: int = 200) -> Tensor:
    rng = torch.Generator().manual_seed(k)
    mix = torch.randn(k, k, generator=rng) / k**0.5 + torch.eye(k)
    x: Tensor = torch.randn(tokens, k, generator=rng) @ mix * torch.exp(torch.randn(k, generator=rng))
    return x.double()


def weight_of(n: int, k: int) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n + k)) * 0.05


def design(grid: Grid, codes: Tensor) -> Tensor:
    """float64 [N, K, P]: what every scale (and offset) is multiplied with, built entry by entry."""
    n, k = codes.shape
    size, groups = grid.fmt.granularity.group_size(k), grid.scale.shape[1]
    out = torch.zeros(n, k, groups * (2 if grid.offset is not None else 1), dtype=torch.float64)
    levels, zero = grid.fmt.element.levels().double()[codes.long()], grid.zero
    for c in range(k):
        out[:, c, c // size] = levels[:, c] - (0 if zero is None else zero[:, c // size])
        if grid.offset is not None:
            out[:, c, groups + c // size] = 1
    return out


@pytest.mark.parametrize(
    "text", ["int2.g16.fz", "int3.ch.fz", "int1.g7.fz", "int2.t.fz", "int2.ch.sym", "int3.g16.asym"]
)
def test_the_closed_form_is_least_squares_on_the_outputs(text: str) -> None:
    fmt, weight, x = scalar_format(text + ".f32"), weight_of(7, 40), inputs_of(40)
    grid = search_grid(weight, fmt)
    codes = grid.encode(weight).codes
    scale, offset = best_sides(weight, grid, codes, x.T @ x)
    found = torch.cat([scale] if offset is None else [scale, offset], 1)
    outputs, target = x @ design(grid, codes), x @ weight.double().T  # [N, T, P], [T, N]
    if fmt.granularity.kind == "t":
        outputs, target = outputs.flatten(0, 1)[None], target.T.reshape(-1, 1)
    expected = torch.linalg.lstsq(outputs, target.T[..., None]).solution[..., 0]
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    gradient = outputs.mT @ (outputs @ found[..., None] - target.T[..., None])
    scale_of = (outputs.abs().mT @ target.T[..., None].abs()).clamp(min=1e-30)
    assert bool((gradient.abs() < 1e-6 * scale_of).all())
    assert (offset is None) == (not fmt.offset)


def test_directions_that_change_nothing_stay() -> None:
    """Equal levels leave scale and offset undetermined; levels of zero, the scale."""
    fmt, weight, x = scalar_format("int2.g4.fz"), weight_of(1, 8), inputs_of(8)
    codes = torch.tensor([[3, 3, 3, 3, 2, 2, 2, 2]], dtype=torch.uint8)  # levels 1 and 0
    grid = Grid(fmt, torch.tensor([[0.5, 0.25]]), None, torch.tensor([[0.0, 0.125]]))
    scale, offset = best_sides(weight, grid, codes, x.T @ x)
    assert offset is not None
    assert bool(scale.isfinite().all())
    assert scale[0, 1] == pytest.approx(0.25)
    heights = torch.tensor([[scale[0, 0] + offset[0, 0]], [offset[0, 1]]])
    blocks = torch.block_diag(*[torch.ones(4, 1)] * 2).double()
    expected = torch.linalg.lstsq(x @ blocks, x @ weight.double().T).solution
    assert torch.allclose(heights.double(), expected, rtol=1e-4)


def test_refitting_is_accepted_row_by_row() -> None:
    weight, fmt, x = weight_of(64, 32), scalar_format("int2.g16.fz.bf16"), inputs_of(32)
    hessian, grid = (x.T @ x).float(), search_grid(weight, scalar_format("int2.g16.fz.bf16"))
    codes = grid.encode(weight).codes
    for _ in range(3):
        fitted = refit_scales(weight, grid, codes, hessian)
        before, after = (row_errors(g.qtensor(codes).dequantize() - weight, hessian) for g in (grid, fitted))
        assert grid.offset is not None
        assert fitted.offset is not None
        changed = (fitted.scale != grid.scale).any(1) | (fitted.offset != grid.offset).any(1)
        assert bool((after <= before).all())
        assert bool((after[changed] < before[changed]).all())
        assert torch.equal(fitted.offset, fitted.offset.to(fmt.scale_dtype).float())
        grid = fitted
    assert not bool(changed.all()), "fitted again, coarse scales find nothing better"


def test_ties_go_up_and_codes_stay_in_range() -> None:
    fmt = scalar_format("int2.ch.fz")
    grid = Grid(fmt, torch.tensor([[1.0]]), None, torch.tensor([[0.25]]))
    values = torch.tensor([[-9.0, -1.25, -0.25, 0.75, 9.0]])  # levels -9.25, -1.5, -0.5, 0.5, 8.75
    levels = fmt.element.levels()[grid.encode(values).codes.long()]
    assert levels.tolist() == [[-2.0, -1.0, 0.0, 1.0, 1.0]]
    columns = ColumnGrid.of(grid, values.shape)
    rounded = torch.cat([columns.round(values[:, c], 0)[1] for c in range(5)])
    assert rounded.tolist() == [-1.75, -0.75, 0.25, 1.25, 1.25]
    assert [end.item() for end in columns.ends()] == [-1.75, 1.25]
    mirrored = Grid(fmt, torch.tensor([[-1.0]]), None, torch.tensor([[0.25]]))
    assert [end.item() for end in ColumnGrid.of(mirrored, values.shape).ends()] == [-0.75, 2.25]


def test_offsets_pay_for_weights_off_centre() -> None:
    weight = weight_of(16, 64) + 0.3
    errors = {}
    for text in ("int3.g16.asym", "int3.g16.fz"):
        q = Rtn().quantize(weight, scalar_format(text), None)
        errors[text] = q.proxy_error
    assert errors["int3.g16.fz"] < 0.3 * errors["int3.g16.asym"]


def test_gptq_with_offsets() -> None:
    weight, x = weight_of(32, 64), inputs_of(64)
    stats = LayerStats(x.T @ x / len(x), len(x))
    found, plain = (Gptq().quantize(weight, scalar_format(f"int2.g16.{s}"), stats) for s in ("fz", "asym"))
    assert found.proxy_error < 0.6 * found.rtn_error
    assert found.proxy_error < plain.proxy_error
    assert found.proxy_error == pytest.approx(proxy_error(weight, found.qtensor.dequantize(), stats.hessian), rel=1e-3)


def test_offsets_that_overflow_are_refused() -> None:
    with pytest.raises(RunError, match=r"LB0512.*offset.*f16"):
        search_grid(torch.full((2, 8), 1e6), scalar_format("int2.ch.fz"))
    out = search_grid(torch.full((2, 8), 1e6), scalar_format("int2.ch.fz.f32")).encode(torch.full((2, 8), 1e6))
    assert bool((out.dequantize() == 1e6).all())


def test_the_relaxed_problem_is_solved() -> None:
    """Against thousands of steps of projected gradient descent in float64."""
    weight, x, fmt = weight_of(12, 48), inputs_of(48), scalar_format("int2.g16.fz")
    prepared = prepare(LayerStats(x.T @ x, 1), 0.01, act_order=True)
    assert prepared is not None
    grid = search_grid(weight, fmt, shrinks=2)
    columns = ColumnGrid.of(grid, weight.shape)
    relaxation = _Relaxation(weight, columns, prepared, BoxSystems.of(prepared, 16))
    target = weight.T[prepared.order].double()
    found = relaxation(0, 0, weight.T[:0], weight.T[prepared.order]).double()
    low, high = relaxation.low.double(), relaxation.high.double()
    hessian = prepared.damped[prepared.order][:, prepared.order].double()
    exact, rate = target.clamp(low, high), 1 / torch.linalg.matrix_norm(hessian, 2)
    for _ in range(20000):
        exact = (exact - rate * (hessian @ (exact - target))).clamp(low, high)
    losses = [float(((hessian @ (v - target)) * (v - target)).sum()) for v in (found, exact, target.clamp(low, high))]
    assert bool(((found >= low - 1e-6) & (found <= high + 1e-6)).all())
    assert losses[1] * 0.999 <= losses[0] < 1.02 * losses[1]
    assert losses[2] > 1.5 * losses[1], "the box matters here"


def test_without_a_limit_the_box_changes_nothing() -> None:
    weight, x = weight_of(12, 48), inputs_of(48)
    prepared = prepare(LayerStats(x.T @ x, 1), 0.01, act_order=True)
    assert prepared is not None
    wide = Grid(scalar_format("int8.ch.fz"), torch.full((12, 1), 0.01), None, torch.zeros(12, 1))
    columns = ColumnGrid.of(wide, weight.shape)
    plain = feedback(weight, columns, prepared.upper, prepared.order, 16)
    boxed = box_feedback(weight, columns, prepared, BoxSystems.of(prepared, 16), 16)
    assert (plain == boxed).float().mean() > 0.999
