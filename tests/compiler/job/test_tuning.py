"""Training of side values: what moves, what stays, and that it helps."""

from __future__ import annotations

import math

import pytest
import torch
from _models import random_qtensor, tiny_llama
from torch import nn

from lowbit.compiler.errors import FormatError
from lowbit.compiler.job.inmemory import choose, quantize_model
from lowbit.compiler.job.tune import Optimizer
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.scheme import PRESETS, Scheme, Tuning, load_scheme
from lowbit.quantizers.tunable import tunable
from lowbit.quantizers.vqtensor import VQTensor
from lowbit.quantizers.weights import random_weight

VECTORS = ["vq.d4.k16", "vq.d4.k16.r4.c2.o8v2k16.cn", "vq.d3.k8.rn.bf16", "vq.d4.k16.r4.in.rn"]
SCALARS = ["int2.g16.fz", "int3.g24.asym", "int4.ch.sym.bf16", "int2.t.fz", "int1.g16.sym", "bcq2.g40", "tcq2.g32"]


def tokens() -> torch.Tensor:
    return torch.randint(0, 80, (8, 48), generator=torch.Generator().manual_seed(0))


def scheme(fmt: str, method: str, **stages: Tuning) -> Scheme:
    return Scheme("test", parse_format(fmt), method, **stages)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", [*SCALARS, *VECTORS])
def test_a_tunable_starts_as_what_it_was_made_from(text: str) -> None:
    q = random_weight(parse_format(text), 24, 40, torch.Generator().manual_seed(0))
    part = tunable(q)
    assert torch.allclose(part.weight(), q.dequantize(), atol=1e-6)
    assert torch.equal(part.result().dequantize(), q.dequantize())


@pytest.mark.parametrize("text", [*SCALARS, *VECTORS])
def test_gradients_are_those_of_the_dense_weight(text: str) -> None:
    """Moving one side value by a little moves the output as the gradient says."""
    q = random_weight(parse_format(text.replace(".bf16", "") + ".f32"), 24, 40, torch.Generator().manual_seed(1))
    part = tunable(q)
    target = torch.randn(24, 40, generator=torch.Generator().manual_seed(2))
    (part.weight() * target).sum().backward()
    for p in part.parameters():
        index = int(p.grad.abs().argmax())
        before = (part.weight() * target).sum().item()
        step = 1e-2 * max(1.0, float(p.detach().abs().max()))
        p.data.view(-1)[index] += step
        after = (part.weight() * target).sum().item()
        p.data.view(-1)[index] -= step
        assert after - before == pytest.approx(step * float(p.grad.view(-1)[index]), rel=1e-2, abs=1e-3)


def test_results_are_stored_values_and_codes_stay() -> None:
    q = random_qtensor("int2.g16.fz", 8, 32)
    part = tunable(q)
    for p in part.parameters():
        p.data += 0.1
    result = part.result()
    assert isinstance(result, QTensor)
    assert torch.equal(result.codes, q.codes)
    assert result.scale.dtype == torch.float16
    assert not torch.equal(result.scale, q.scale)


@pytest.mark.parametrize(
    ("fmt", "method"), [("int2.g16.fz", "decoupleq"), ("vq.d4.k16", "vptq"), ("int2.g32.asym", "gptq")]
)
@pytest.mark.parametrize("sequential", [True, False])
def test_block_tuning_brings_the_model_closer(fmt: str, method: str, sequential: bool) -> None:
    model, ids = tiny_llama(), tokens()
    want = model(input_ids=ids).logits
    errors = []
    for stages in ({}, {"tune": Tuning(4, 1e-2, 2)}):
        net = quantize_model(tiny_llama(), scheme(fmt, method, **stages), ids, sequential=sequential)
        errors.append(float((net(input_ids=ids).logits - want).detach().square().mean()))
    assert errors[1] < errors[0]


def test_fine_tuning_lowers_the_divergence_and_trains_the_last_norm() -> None:
    messages: list[str] = []

    class Sink:
        def start(self, *_: object) -> None: ...
        def layer(self, *_: object) -> None: ...
        def finish(self) -> None: ...
        def message(self, text: str) -> None:
            messages.append(text)

    model, ids = tiny_llama(), tokens()
    plain = choose(model, scheme("vq.d4.k16", "vptq"), ids)
    tuned = choose(model, scheme("vq.d4.k16", "vptq", finetune=Tuning(4, 1e-2, 4)), ids, progress=Sink())
    assert "model.norm.weight" in tuned.plain
    assert any("fine-tuning" in m for m in messages)
    for path, (q, _) in tuned.layers.items():
        assert isinstance(q, VQTensor)
        assert torch.equal(q.indices, plain.layers[path][0].indices)
    assert any(not torch.equal(q.centroids, plain.layers[p][0].centroids) for p, (q, _) in tuned.layers.items())
    want = model(input_ids=ids).logits.log_softmax(-1)

    def divergence(found: object) -> float:
        net = tiny_llama()
        state = dict(net.named_parameters())
        for name, value in found.plain.items():
            state[name].data.copy_(value)
        for path, (q, _) in found.layers.items():
            net.get_submodule(path).weight.data.copy_(q.dequantize())
        own = net(input_ids=ids).logits.log_softmax(-1)
        return float(nn.functional.kl_div(own, want, log_target=True, reduction="sum").detach())

    assert divergence(tuned) < divergence(plain)


def test_the_teacher_is_left_as_it_was() -> None:
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    choose(model, scheme("int2.g16.fz", "rtn", tune=Tuning(1), finetune=Tuning(1)), tokens())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_tuning_is_reproducible() -> None:
    runs = [choose(tiny_llama(), scheme("int2.g16.fz", "rtn", tune=Tuning(2, 1e-2)), tokens()) for _ in range(2)]
    for path, (q, _) in runs[0].layers.items():
        assert torch.equal(q.scale, runs[1].layers[path][0].scale)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Optimizer([p], Tuning(1, 0.1), 4)
    assert math.isnan(optimizer.step([(p * torch.tensor(float("nan"))).sum()]))
    assert torch.equal(p.detach(), torch.ones(3))
    assert optimizer.step([p.sum(), p.sum()]) == 6
    assert not torch.equal(p.detach(), torch.ones(3))


def test_tuning_that_does_not_help_is_dropped() -> None:
    ids = tokens()
    wild = choose(tiny_llama(), scheme("int8.g16.sym", "rtn", tune=Tuning(1, 0.9, 1, norms=False)), ids)
    plain = choose(tiny_llama(), scheme("int8.g16.sym", "rtn"), ids)
    assert all(torch.equal(q.scale, plain.layers[path][0].scale) for path, (q, _) in wild.layers.items())


def test_settings_in_scheme_files_and_presets() -> None:
    assert PRESETS["w2-vptq"].tune == PRESETS["w2-tcq"].tune == Tuning()
    text = Scheme.from_dict(
        {"weight": "int2.g64.fz", "method": "rtn", "tune": {"epochs": 3}, "finetune": {"rate": 0.01}}
    )
    assert (text.tune, text.finetune) == (Tuning(3), Tuning(rate=0.01))
    assert Scheme.from_dict(text.to_dict()) == text
    assert load_scheme("w2-vptq", tune=0).tune is None
    assert load_scheme("w4a16", finetune=5).finetune == Tuning(5)
    for bad in ({"epoch": 1}, {"epochs": "x"}, {"epochs": 0}, {"rate": 2.0}, 3, {"norms": 1}):
        with pytest.raises(FormatError, match="LB0232"):
            Scheme.from_dict({"weight": "int2.g64.fz", "tune": bad})
