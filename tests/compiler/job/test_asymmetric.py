"""Runs whose layers aim at what the float model's own layers put out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from _cli import invoke_json
from _experts import mixture
from _jobs import Recorder, contents, quantize, save_tiny, scheme, token_ids
from _models import tiny_llama

from lowbit.compiler.errors import RunError
from lowbit.compiler.io.checkpoint import read_checkpoint
from lowbit.compiler.job.inmemory import choose, choose_codes, quantize_model
from lowbit.compiler.job.journal import Journal
from lowbit.compiler.job.workers import Workers
from lowbit.compiler.runtime.experts import unstacked
from lowbit.quantizers.calibration import LayerStats
from lowbit.quantizers.methods import Gptq
from lowbit.quantizers.qtensor import QTensor
from lowbit.quantizers.scheme import Scheme

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
QUICK = {"refits": 0, "clip_search": False, "asymmetric": 0.5}
SCHEMES = {
    "gptq": scheme("int3.g16.asym", **QUICK),
    "tuned": Scheme.from_dict(
        {"weight": "int3.g16.asym", "options": QUICK, "tune": {"epochs": 1, "rate": 0.01, "batch": 2}}
    ),
    "rounded": Scheme.from_dict(
        {
            "weight": "int4.g32.sym", "method": "fmpq", "activation": "int4.g32", "rewrites": ["rotate", "permute"],
            "options": {**QUICK, "aware": True},
        }
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("asymmetric") / "model", "20KB", **SMALL)


def small() -> Any:
    return tiny_llama(**SMALL)


@pytest.mark.parametrize("name", SCHEMES)
def test_files_and_memory_give_the_same_codes(name: str, model: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = SMALL
    if name == "rounded":  # kernels multiply groups of 32
        sizes, model = {}, save_tiny(tmp_path / "model")
    result = quantize(model, tmp_path / "out", SCHEMES[name])
    found = choose(tiny_llama(**sizes), SCHEMES[name], token_ids())
    plain = choose(tiny_llama(**sizes), _without(SCHEMES[name]), token_ids())
    checkpoint = read_checkpoint(tmp_path / "out")
    assert set(checkpoint.modules) == set(found.layers)
    for path, (q, _) in found.layers.items():
        assert torch.equal(checkpoint.qtensor(path).dequantize(), q.dequantize()), path
    changed = {p for p, (q, _) in found.layers.items() if not torch.equal(q.codes, plain.layers[p][0].codes)}
    first = {f"model.layers.0.self_attn.{x}_proj" for x in "qkv"}
    assert changed >= set(found.layers) - first
    if name != "rounded":  # nothing is quantized before these; rounded inputs differ from the first layer on
        assert not changed & first
    assert result.report["scheme"]["options"]["asymmetric"] == 0.5
    assert not [note for note in result.report["notes"] if "not known" in note]


def _without(chosen: Scheme) -> Scheme:
    values = chosen.to_dict()
    return Scheme.from_dict({**values, "options": {**values["options"], "asymmetric": 0.0}})


def test_the_statistics_compare_the_float_model_with_what_is_quantized_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer's shift is that between two whole models: all float, and quantized up to the layer."""
    seen: list[LayerStats] = []
    submit = Workers.submit

    def noting(self: Workers, method: Any, weight: Any, fmt: Any, stats: Any) -> Any:
        seen.append(stats)
        return submit(self, method, weight, fmt, stats)

    monkeypatch.setattr(Workers, "submit", noting)
    chosen, ids = SCHEMES["gptq"], token_ids()
    found = choose_codes(small(), chosen, ids)
    paths = list(found)
    partly = small()
    for path in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj", "model.layers.1.mlp.gate_proj"):
        at = paths.index(path)
        for before in paths[:at]:
            partly.get_submodule(before).weight.data.copy_(found[before][0].dequantize())
        r, x = (_reads(net, path, ids).double() for net in (small(), partly))
        expected = (r - x).T @ x / len(x)
        assert float((r - x).norm()) > 0.01 * float(r.norm())
        assert float((seen[at].shift - expected).norm()) < 1e-3 * float(expected.norm())


@torch.no_grad()
def _reads(net: Any, path: str, ids: torch.Tensor) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    hook = net.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    net(input_ids=ids)
    hook.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])


def test_the_models_output_comes_nearer() -> None:
    ids = token_ids(16, 32)
    errors = []
    for share in (0.0, 1.0):
        net: Any = tiny_llama(num_hidden_layers=3)
        with torch.no_grad():
            want = net(input_ids=ids).logits
            for path, (q, _) in choose_codes(
                net, scheme("int2.g32.asym", **{**QUICK, "asymmetric": share}), ids
            ).items():
                net.get_submodule(path).weight.copy_(q.dequantize())
            errors.append(float((net(input_ids=ids).logits - want).norm() / want.norm()))
    assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("name", ["gptq", pytest.param("tuned", marks=pytest.mark.slow)])
def test_killed_runs_go_on_and_write_the_same_bytes(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, seen = Journal.append, list[str]()

    class Killed(BaseException):
        """Stands for the end of the process."""

    def dying(self: Journal, record: dict[str, Any]) -> None:
        if len(seen) == limit:
            raise Killed
        seen.append(str(record["event"]))
        append(self, record)

    monkeypatch.setattr(Journal, "append", dying)
    limit = -1
    whole = quantize(model, tmp_path / "whole", SCHEMES[name])
    events = list(seen)
    first = events.index("block")
    for limit in (events.index("group") + 2, first, first + 3):
        seen.clear()
        with pytest.raises(Killed):
            quantize(model, tmp_path / f"out{limit}", SCHEMES[name])
        limit, place, sink = -1, limit, Recorder()
        again = quantize(model, tmp_path / f"out{place}", SCHEMES[name], progress=sink)
        assert any("continuing" in message for message in sink.messages)
        assert contents(tmp_path / f"out{place}") == contents(tmp_path / "whole"), f"killed at {place} of {events}"
        assert again.report["totals"]["mean_proxy_error"] == whole.report["totals"]["mean_proxy_error"]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_memory_is_bounded(tmp_path: Path) -> None:
    """What is held on top is one float block and the statistics, whatever the number of blocks."""
    held = {}
    for blocks in (2, 3):
        source = save_tiny(tmp_path / f"model{blocks}", num_hidden_layers=blocks)
        for share in (0.0, 0.5)[blocks - 2 :]:
            out = tmp_path / f"out{blocks}{share}"
            chosen = scheme(**{**QUICK, "asymmetric": share})
            held[blocks, share] = quantize(source, out, chosen).report["peak_memory"]["tensor_bytes"]
    block = sum(p.numel() * 4 for p in tiny_llama().model.layers[0].parameters())
    assert held[2, 0.5] == held[3, 0.5]
    assert held[2, 0.0] + block <= held[2, 0.5] < held[2, 0.0] + block + 100 * 96**2


def test_runs_choose_the_usual_share_where_layers_follow_each_other() -> None:
    net, ids = small(), token_ids(4, 24)

    def codes(sequential: bool = True, **options: Any) -> Any:
        chosen = scheme("int3.g16.asym", **{"refits": 0, "clip_search": False, **options})
        found = choose_codes(net, chosen, ids, sequential=sequential)
        return [q.codes for q, _ in found.values() if isinstance(q, QTensor)]

    def same(a: Any, b: Any) -> bool:
        return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))

    assert same(codes(), codes(asymmetric=Gptq.usual))
    assert not same(codes(), codes(asymmetric=0.0))
    assert same(codes(sequential=False), codes(sequential=False, asymmetric=0.0))


def test_where_nothing_can_be_compared_it_is_refused_or_said(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"LB0518.*sequential"):
        quantize(model, tmp_path / "out", SCHEMES["gptq"], sequential=False)
    with pytest.raises(RunError, match="LB0518"):
        quantize_model(small(), SCHEMES["gptq"], token_ids(), sequential=False)
    file = tmp_path / "s.toml"
    file.write_text('weight = "int3.g16.asym"\n[options]\nasymmetric = 0.5\n')
    refused = invoke_json("plan", model, "--scheme", file, "--parallel", exit_code=3)
    assert "LB0518" in refused["problems"][0]
    usual = ("w3a16", "-f", "int3.g16.asym")
    plans = [invoke_json("plan", model, "--scheme", *s) for s in ((file,), usual, (*usual, "--parallel"))]
    assert plans[0]["peak_memory_bytes"] == plans[1]["peak_memory_bytes"] > plans[2]["peak_memory_bytes"]
    whole = {"weight": "int3.g16.asym", "options": QUICK, "ignore": []}
    mixed: Any = mixture("Mixtral")
    with unstacked(mixed):
        layers = choose_codes(mixed, Scheme.from_dict(whole), token_ids(4, 24))
    said = {path for path, (_, entry) in layers.items() if any("not known" in note for note in entry.notes)}
    assert said
    assert all(".experts." in path or path == "lm_head" for path in said)
