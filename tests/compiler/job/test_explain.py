"""`quantize explain`: fusions, refusals and what is left, found without running anything."""

from __future__ import annotations

from pathlib import Path

import torch
from _cli import invoke, invoke_json, save_tiny_llama
from _models import SIZES, swap_linears, tiny_llama
from transformers import MixtralConfig, MixtralForCausalLM

import lowbit
from lowbit.compiler.job.explain import alike
from lowbit.compiler.runtime import dispatch


def test_a_quantized_model_is_explained_without_kernels() -> None:
    dispatch.reset()
    found = lowbit.explain(swap_linears(tiny_llama(), "int4.g32.sym"))
    assert (found.graphs, found.kernels, found.breaks, found.program) == (1, 8, [], None)
    assert "model.layers.*.mlp.gate_proj + model.layers.*.mlp.up_proj: silu_mul in the kernel (2 times)" in found.fused
    assert any("q_proj" in line and "norm in the kernel" in line for line in found.fused)
    assert found.left == ["lm_head: linear on 80 x 64 float32"]
    assert found.microseconds > 0
    assert not dispatch.loaded_kernels()


def test_models_that_are_not_quantized_are_taken_as_a_scheme_would_have_them(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, num_hidden_layers=1)
    found = invoke_json("explain", tmp_path, "-s", "w4a16")
    assert (found["graphs"], found["kernels"], found["breaks"], found["notes"]) == (1, 4, [], [])
    assert found["program"] is None
    text = invoke("explain", tmp_path).stdout
    assert "graphs        1, 0 graph breaks" in text
    assert "left to torch: lm_head: linear on 80 x 64 float32" in text


def test_experts_are_explained(tmp_path: Path) -> None:
    """As a scheme would have them, and counted as often as a token uses them."""
    sizes = {**SIZES, "num_hidden_layers": 1, "num_local_experts": 4}
    found = []
    for active in (1, 4):
        torch.manual_seed(0)
        config = MixtralConfig(**sizes, num_experts_per_tok=active)
        MixtralForCausalLM(config).save_pretrained(tmp_path / str(active))
        found.append(invoke_json("explain", tmp_path / str(active), "-s", "w4a16"))
    one, all_ = found
    assert (one["graphs"], one["breaks"], one["kernels"]) == (1, [], 2 + 3)
    assert any("all experts in one operator" in line for line in one["fused"])
    assert one["microseconds"] < 0.7 * all_["microseconds"]
    assert not any("experts" in line for line in (*one["left"], *one["notes"]))
    assert one["program"] is None


def test_lines_of_equal_blocks_are_one() -> None:
    assert alike(["a.0.b: c", "a.1.b: c", "a.x"]) == ["a.*.b: c (2 times)", "a.x"]
