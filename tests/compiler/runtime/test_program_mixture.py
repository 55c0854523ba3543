"""Mixtures of experts in native programs: the model's numbers and text, routing judged apart, refusals by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from _experts import mixture
from _models import dequantized, swap_linears
from torch import nn

import lowbit
from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.compiler.errors import RunError
from lowbit.compiler.runtime.experts import Experts
from lowbit.compiler.runtime.program.engine import DecoderProgram
from lowbit.compiler.runtime.program.mixture import MixtureParts
from lowbit.compiler.runtime.program.parts import DecoderParts, read_decoder
from lowbit.compiler.runtime.program.verify import verify_program

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")

FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {},
    "Qwen2Moe": {"norm_topk_prob": False, "qkv_bias": False, "rms_norm_eps": 1e-5},
    "Qwen3Moe": {"norm_topk_prob": True, "mlp_only_layers": [0], "rms_norm_eps": 1e-5},
    "Olmoe": {"norm_topk_prob": False, "num_experts_per_tok": 1, "hidden_act": "gelu_pytorch_tanh"},
}
"""All but the last give one program text, which is compiled once."""
FLOAT = ("lm_head", "q_proj", "k_proj", "v_proj", "o_proj", "shared_expert_gate")
"""Layers that stay float where experts are what a test is about: every other shape is a kernel to compile."""


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def _ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 80, (count,), generator=torch.Generator().manual_seed(seed))


def _program(model: Any, parts: DecoderParts | None = None) -> DecoderProgram:
    return DecoderProgram(parts or read_decoder(model, 48, "f32"), max_tokens=8, context=48)


def _with(parts: DecoderParts, **changes: Any) -> DecoderParts:
    """The same model with another first layer."""
    first, *rest = parts.layers
    assert isinstance(first.mlp, MixtureParts)
    return replace(parts, layers=[replace(first, mlp=replace(first.mlp, **changes)), *rest])


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    """Float experts, prompts in pieces and single tokens; a dense layer and another activation in one of them."""
    model: Any = mixture(name, layers=2, **FAMILIES[name])
    program = _program(model)
    cache, ids = program.new_cache(), _ids(24)
    got = torch.cat([program.run(part, cache, keep=part.numel()) for part in ids.split([13, *[1] * 6, 5])])
    assert torch.allclose(got, model(ids[None], use_cache=False).logits[0], atol=1e-5)
    assert verify_program(program, model, prompt=20, steps=3) < 1e-5
    assert set(program.routes(1)) == ({1} if name == "Qwen3Moe" else {0, 1})


def test_threads_change_no_bit() -> None:
    """A piece so long that every part is shared out."""
    model: Any = mixture("Mixtral", layers=2, max_position_embeddings=2048)
    parts = read_decoder(model, 1200, "f32")
    program = DecoderProgram(parts, max_tokens=1200, context=1200, threads=2)
    ids, found, threads = _ids(1200), [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            cache = program.new_cache(1200)
            found.append((program.run(ids[:1199], cache, keep=9), program.run(ids[1199:], cache), program.routes(1)[1]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert torch.allclose(found[0][1], model(ids[None], use_cache=False, logits_to_keep=1).logits[0], atol=1e-4)


def test_experts_without_tokens_and_ties() -> None:
    """One expert a token; of two that are equally likely the first is taken. What the other one holds is not read."""
    model: Any = mixture("Olmoe", layers=2, **FAMILIES["Olmoe"])
    weight = model.model.layers[0].mlp.gate.weight
    weight[3] = weight[1]
    program = _program(model)
    pieces = _ids(24).split([8, 8, *[1] * 8])

    def run() -> tuple[torch.Tensor, set[int]]:
        cache, logits, taken = program.new_cache(), [], set()
        for part in pieces:
            logits.append(program.run(part, cache, keep=part.numel()))
            taken |= set(program.routes(part.numel())[0].flatten().tolist())
        return torch.cat(logits), taken

    before, taken = run()
    assert taken == {0, 1, 2}
    assert verify_program(program, model, prompt=20, steps=3) < 1e-5
    model.model.layers[0].mlp.experts.gate_up_proj[3] = torch.nan  # the program's own memory
    assert torch.equal(run()[0], before)
    model.model.layers[0].mlp.experts.gate_up_proj[1] = torch.nan
    assert run()[0].isnan().any()


def test_routes_are_compared_apart() -> None:
    """Between equally likely experts rounding may decide, and nothing else may."""
    model: Any = mixture("Olmoe", layers=2, **FAMILIES["Olmoe"] | {"norm_topk_prob": True})
    router = model.model.layers[0].mlp.gate
    router.weight[2:] = router.weight[:2]
    parts = read_decoder(model, 48, "f32")
    first = parts.layers[0].mlp
    assert isinstance(first, MixtureParts)

    def routed(weight: torch.Tensor) -> DecoderProgram:
        return _program(model, _with(parts, router=replace(first.router, dense=weight)))

    near = routed(router.weight * torch.tensor([1, 1, 1 + 1e-5, 1 + 1e-5])[:, None])
    got, own = near.run(_ids(8), near.new_cache(), keep=8), model(_ids(8)[None], use_cache=False).logits[0]
    assert (got - own).abs().max() > 0.1  # other experts, other numbers
    assert verify_program(near, model) < 1e-4
    with pytest.raises(RunError, match=r"LB0565.*router logits"):
        verify_program(routed(router.weight[[1, 0, 3, 2]].contiguous()), model)
    with pytest.raises(RunError, match=r"LB0565.* logits"):
        verify_program(_program(model, _with(parts, normalised=False)), model)
    with pytest.raises(RunError, match=r"LB0565.* logits"):
        verify_program(_program(model, _with(parts, experts=first.experts[::-1])), model)


def test_quantized_experts(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Text of the weights' own numbers; gate and up of an expert are one kernel on the only copy of their bytes."""
    model: Any = swap_linears(mixture("Qwen2Moe", layers=2, **FAMILIES["Qwen2Moe"]), "int4.g32.sym", skip=FLOAT)
    oracle: Any = dequantized(copy.deepcopy(model))
    model = lowbit.compile(model, max_tokens=4, mode="program", context=64, cache="f32")
    program: DecoderProgram = model.lowbit_program
    ids = _ids(11)
    want = oracle.generate(ids[None], max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert model.generate(ids[None], max_new_tokens=20, do_sample=False, eos_token_id=None).tolist() == want.tolist()
    assert model.lowbit_program.generate(ids, 20).tolist() == want[0].tolist()
    assert torch.allclose(model(ids[None]).logits, oracle(ids[None]).logits, atol=1e-2)
    held = next(m for m in model.modules() if isinstance(m, Experts))
    first = program.parts.layers[0].mlp
    assert isinstance(first, MixtureParts)
    assert set(first.experts[2]) == {"gate", "down"}
    read: Any = first.experts[2]["gate"].packed
    assert read.plane0.data_ptr() == held.layer(2, "gate_proj").inner.plane0.data_ptr()  # type: ignore[union-attr]
    assert read.plane0.nbytes == 2 * held.layer(2, "up_proj").inner.plane0.nbytes  # type: ignore[union-attr]
    # Calls that the program does not do find the same weights in the modules.
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    given = model(ids[None], output_router_logits=True)
    assert "router logits" in caplog.text
    assert len(given.router_logits) == 2
    assert torch.allclose(given.logits, oracle(ids[None]).logits, atol=1e-3)


class _Sigmoid(nn.Module):
    """A router of another kind."""

    def __init__(self, old: Any) -> None:
        super().__init__()
        self.weight = old.weight

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = nn.functional.linear(x, self.weight)
        return (logits, *logits.sigmoid().topk(2))


def test_refusals_name_the_part() -> None:
    with pytest.raises(RunError, match=r"LB0560.*model.layers.0.self_attn.sinks"):
        read_decoder(mixture("GptOss"), 32)
    with pytest.raises(RunError, match=r"LB0560.*clip_qkv"):
        read_decoder(mixture("Olmoe", clip_qkv=3.0), 32)
    model: Any = mixture("Mixtral", layers=2)
    block = model.model.layers[1].mlp
    block.experts.has_post_expert_norm = True
    with pytest.raises(RunError, match=r"LB0560.*model.layers.1.mlp.experts: .*not understood"):
        read_decoder(model, 32)
    block.gate = _Sigmoid(block.gate)
    with pytest.raises(RunError, match=r"LB0560.*model.layers.1.mlp.gate: .*softmax"):
        read_decoder(model, 32)
    block.gate.bias = nn.Parameter(torch.zeros(4))
    with pytest.raises(RunError, match=r"LB0560.*model.layers.1.mlp.gate: .*routes"):
        read_decoder(model, 32)
    block.norm = nn.LayerNorm(64)
    with pytest.raises(RunError, match=r"LB0560.*model.layers.1.mlp.norm"):
        read_decoder(model, 32)
