"""A decoder as one native program: numbers as the model's own, text as the model's own, refusals that name the part."""

from __future__ import annotations

import copy
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from _models import SIZES, dequantized, round_to_nearest, swap_linears, tiny_llama
from torch import nn

import lowbit
from lowbit.codegen.cpp.decoder.emit import emit_program
from lowbit.codegen.cpp.toolchain import find_compiler
from lowbit.codegen.reference.backend import decode_stored
from lowbit.compiler.errors import KernelError, RunError
from lowbit.compiler.ir.layout import LAYOUTS
from lowbit.compiler.ir.target import CPU_ISAS, isa_compiles_here
from lowbit.compiler.runtime import dispatch
from lowbit.compiler.runtime.fused import SiblingLinear
from lowbit.compiler.runtime.modules import QuantLinear
from lowbit.compiler.runtime.program import verify
from lowbit.compiler.runtime.program.cache import ProgramCache
from lowbit.compiler.runtime.program.engine import DecoderProgram
from lowbit.compiler.runtime.program.install import compile_program
from lowbit.compiler.runtime.program.parts import read_decoder
from lowbit.compiler.runtime.program.verify import _decoded, verify_program
from lowbit.quantizers.formats import catalog, parse_activation, parse_format
from lowbit.quantizers.scheme import Scheme
from lowbit.quantizers.weights import pack_weights, random_weight

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")


def _ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 80, (count,), generator=torch.Generator().manual_seed(seed))


def _tiny(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "head_dim": 16, **changes})
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def _loud(model: Any) -> Any:
    """Weights so large that attention and every bias matter."""
    for p in model.parameters():
        nn.init.normal_(p, std=0.3) if p.dim() > 1 else nn.init.uniform_(p, -0.2, 0.3)
    return model


@pytest.fixture(scope="module")
def pair() -> tuple[Any, nn.Module]:
    """(a quantized Llama compiled to a program, the same model with dense oracle weights)."""
    model = swap_linears(tiny_llama(), "int4.g32.sym")
    oracle = dequantized(copy.deepcopy(model))
    return lowbit.compile(model, max_tokens=4, mode="program", context=64), oracle


@torch.no_grad()
def test_logits_are_the_models(pair: tuple[Any, Any]) -> None:
    model, oracle = pair
    ids = _ids(23)[None]  # longer than a step, so the prompt is cut
    got, want = model(ids).logits[0], oracle(ids).logits[0]
    divergence = torch.nn.functional.kl_div(
        got.log_softmax(-1), want.log_softmax(-1), log_target=True, reduction="none"
    )
    assert divergence.sum(-1).abs().max() < 1e-6
    one = model(ids, logits_to_keep=2).logits[0]
    assert one.shape[0] == 2
    assert torch.allclose(one, got[-2:], atol=1e-5)


@pytest.mark.parametrize("cache", ["f32", "kv4.kc32.vt.w32.rot"])
@pytest.mark.parametrize("arch", CPU_ISAS)
def test_every_instruction_set_has_its_primitives(pair: tuple[Any, Any], arch: str, cache: str) -> None:
    compiler = find_compiler() if isa_compiles_here(arch) else shutil.which("aarch64-linux-gnu-g++")
    if compiler is None or not (isa_compiles_here(arch) or arch.startswith("neon")):
        pytest.skip(f"no compiler here makes code for {arch}")
    source = emit_program(replace(pair[0].lowbit_program.spec, cache=cache), arch)
    flags = [flag for flag in source.flags if flag != "-shared"]
    command = [compiler, *flags, "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(command, input=source.text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@torch.no_grad()
def test_generate_gives_the_models_text(pair: tuple[Any, Any]) -> None:
    model, oracle = pair
    for seed in range(3):
        prompt = _ids(3 + 4 * seed, seed)
        want = oracle.generate(prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=None)
        got = model.generate(prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert got.tolist() == want.tolist()
        assert model.lowbit_program.generate(prompt, 20).tolist() == want[0].tolist()


@torch.no_grad()
def test_cache_grows_crops_and_ends(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    program: DecoderProgram = model.lowbit_program
    ids = _ids(40)
    small, large = ProgramCache(program.spec, 1, 64), ProgramCache(program.spec, 64, 64)
    assert small.capacity < large.capacity
    want = program.run(ids, large, keep=40)
    got = torch.cat([program.run(part, small, keep=part.numel()) for part in ids.split(7)])
    assert torch.allclose(got, want, atol=1e-5)
    small.crop(-10)
    assert torch.allclose(program.run(ids[30:], small), want[-1:], atol=1e-5)
    with pytest.raises(RunError, match="LB0562"):
        program.run(_ids(30), small)
    with pytest.raises(RunError, match="LB0564"):
        program.run(torch.tensor([80]), program.new_cache())


@pytest.fixture
def reference_modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules beside a program build kernels of their own: not here, and not for tests that come after."""
    monkeypatch.setenv("LOWBIT_BACKENDS", "reference")
    yield
    dispatch.reset()


@torch.no_grad()
@pytest.mark.usefixtures("reference_modules")
def test_calls_it_does_not_do_run_module_by_module(
    pair: tuple[Any, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, oracle = pair
    batch = torch.stack([_ids(5), _ids(5, 1)])
    assert torch.allclose(model(batch).logits, oracle(batch).logits, atol=1e-3)
    assert "not one sequence" in caplog.text
    with pytest.raises(RunError, match=r"LB0563.*embeddings"):
        model(inputs_embeds=torch.zeros(1, 2, 64), past_key_values=model.lowbit_program.new_cache())
    ids, mask = 1 + _ids(6)[None] % 79, torch.tensor([[0, 0, 1, 1, 1, 1]])
    options = {"attention_mask": mask, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), oracle.generate(ids, **options))  # no cache modules cannot use
    options = {"output_hidden_states": True, "return_dict_in_generate": True, "max_new_tokens": 1}
    assert len(model.generate(ids, **options).hidden_states[0]) == 3
    monkeypatch.setattr(model.config, "output_hidden_states", True)
    assert len(model(ids).hidden_states) == 3


@torch.no_grad()
def test_outputs_come_as_they_are_asked_for(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    logits, cache = model(_ids(5)[None], return_dict=False)
    assert torch.equal(logits, model(_ids(5)[None]).logits)
    assert isinstance(cache, ProgramCache)


@torch.no_grad()
def test_what_a_program_read_cannot_change_behind_it(pair: tuple[Any, Any]) -> None:
    model, _ = pair
    with pytest.raises(RunError, match="LB0579"):
        model.load_state_dict(model.state_dict())
    larger = ProgramCache(model.lowbit_program.spec, 16, 65)
    others = ProgramCache(replace(model.lowbit_program.spec, layers=1), 16, 64)
    for cache in (larger, others):  # rows or positions that this program's memory does not have
        with pytest.raises(RunError, match="LB0563"):
            model(_ids(3)[None], past_key_values=cache)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Mistral", {"sliding_window": 6}),
        ("Qwen2", {}),
        ("Qwen3", {"attention_bias": True}),
        ("Gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
    ],
)
def test_architectures(name: str, changes: dict[str, Any]) -> None:
    """Dense weights: what differs between families is between the linear layers."""
    model = _loud(_tiny(name, **changes))
    program = DecoderProgram(read_decoder(model, 48, "f32"), max_tokens=8, context=48)
    assert verify_program(program, model, prompt=20, steps=3) < 1e-4


@pytest.mark.parametrize("other", ["q", "k", "v"])
def test_projections_of_different_formats(other: str) -> None:
    """Two of three are one matrix then, as in files of llama.cpp, which gives values more bits than queries."""
    model: Any = tiny_llama()
    for path, layer in [(p, m) for p, m in model.named_modules() if p.endswith("_proj")]:
        parent, _, name = path.rpartition(".")
        fmt = "int8.g32.sym" if name == f"{other}_proj" and "layers.1" in path else "int4.g32.sym"
        packed = QuantLinear.from_qtensor(round_to_nearest(layer.weight, parse_format(fmt)), None)
        setattr(model.get_submodule(parent), name, packed)
    oracle = dequantized(copy.deepcopy(model))
    ids = _ids(11)[None]
    with torch.no_grad():
        got = lowbit.compile(model, max_tokens=4, mode="program", context=64)(ids).logits
        assert torch.allclose(got, oracle(ids).logits, atol=1e-4)
    assert isinstance(model.model.layers[1].self_attn.k_proj, SiblingLinear) == (other != "k")


@torch.no_grad()
@pytest.mark.parametrize("text", ["kv4.kc32.vt.w32.rot", pytest.param("k8v2.kt.vt32.w5", marks=pytest.mark.slow)])
def test_a_packed_cache_is_that_of_the_modules(text: str) -> None:
    """Prompts, single tokens, a few at once, and a prompt behind them: as with `QuantizedCache`."""
    model: Any = _loud(tiny_llama(max_position_embeddings=320, head_dim=32))
    program = DecoderProgram(read_decoder(model, 320, text), max_tokens=64, context=320)
    own, ids = program.new_cache(8), _ids(300)
    pieces = ids.split([40, *[1] * 190, 5, 40, *[1] * 25])
    got = torch.cat([program.run(part, own, keep=part.numel()) for part in pieces])
    cache = lowbit.QuantizedCache(model, text)
    model.set_attn_implementation("lowbit")
    want = torch.cat([model(part[None], past_key_values=cache).logits[0] for part in pieces])
    spread = (want - want.mean(-1, keepdim=True)).square().mean().sqrt()
    assert float((got - want).square().mean().sqrt() / spread) < 2e-3
    model.set_attn_implementation("sdpa")
    plain = model(ids[None], use_cache=False).logits[0]  # what is compared differs from no quantization by far more
    assert float((plain - want).square().mean().sqrt() / spread) > 2e-2
    assert own.nbytes() < ProgramCache(replace(program.spec, cache="f16"), 300, 320).nbytes() / 2
    with pytest.raises(KernelError, match="LB0427"):
        own.crop(-1)


@torch.no_grad()
def test_a_models_own_cache_format_is_used() -> None:
    model: Any = _loud(tiny_llama(max_position_embeddings=320, head_dim=32))
    model.kv_format = "kv4.kc32.vt.w32.rot"  # what `lowbit.quantize` and `lowbit.load` leave there
    compile_program(model, max_tokens=16, context=96)
    assert model.lowbit_program.spec.cache == model.kv_format
    prompt = _ids(12)
    got = model.generate(prompt[None], max_new_tokens=60, do_sample=False, eos_token_id=None)
    assert got[0].tolist() == model.lowbit_program.generate(prompt, 60).tolist()
    with pytest.raises(RunError, match="LB0562"):
        model.lowbit_program.run(_ids(30), model(got, use_cache=True).past_key_values)


@pytest.mark.slow
def test_float16_caches_and_bfloat16_models_stay_close() -> None:
    model = _tiny("Mistral", sliding_window=6).to(torch.bfloat16)
    program = DecoderProgram(read_decoder(model, 48, "f16"), max_tokens=8, context=48)
    assert verify_program(program, model) < 3e-2


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_dense_matrices_of_16_bits_are_read_as_they_are(dtype: torch.dtype) -> None:
    """The same numbers in float32 give the same logits to the bit, in tiles of every size and ragged rows."""
    sizes = {"hidden_size": 72, "intermediate_size": 75, "vocab_size": 83, "num_hidden_layers": 1}
    half = _loud(_tiny("Qwen2", **sizes)).to(dtype)
    parts, whole = read_decoder(half, 48, "f32"), read_decoder(copy.deepcopy(half).float(), 48, "f32")
    programs = [DecoderProgram(p, max_tokens=16, context=48) for p in (parts, replace(whole, rope=parts.rope))]
    for count in (1, 2, 3, 4, 7, 16):
        got, want = (p.run(_ids(count), p.new_cache(), keep=count) for p in programs)
        assert torch.equal(got, want)


def test_a_program_that_disagrees_is_refused() -> None:
    model = _loud(_tiny("Mistral", sliding_window=6))
    parts = read_decoder(model, 48, "f32")
    parts.rope[:, 1].neg_()  # as if positions turned the other way
    with pytest.raises(RunError, match="LB0565"):
        verify_program(DecoderProgram(parts, max_tokens=8, context=48), model)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_difference_may_be_as_large_as_rounding_makes_it(wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the usual limit is not enough, the model's own answer to moved activations says what is rounding."""
    monkeypatch.setattr(verify, "TOLERANCE", dict.fromkeys(verify.TOLERANCE, 1e-9))
    model = lowbit.compile(swap_linears(_loud(tiny_llama()), "int4.g32.sym"), max_tokens=8)
    parts = read_decoder(model, 48, "f32")
    if wrong:
        parts.rope[:, 1].neg_()
    program = DecoderProgram(parts, max_tokens=8, context=48)
    if wrong:
        with pytest.raises(RunError, match="LB0565"):
            verify_program(program, model)
    else:
        assert verify_program(program, model) > 1e-9


def _rounded(activation: str, dtype: torch.dtype) -> Any:
    scheme = Scheme("rounded", parse_format("int8.ch.sym"), "rtn", {}, activation=parse_activation(activation))
    return lowbit.compile(lowbit.quantize(_loud(tiny_llama()).to(dtype), scheme), max_tokens=8)


def test_rounded_inputs_hide_no_mistake() -> None:
    """A program rounds what the reference rounds, to the same levels but for a few: other differences are its own."""
    model = _rounded("int8.token", torch.float32)
    parts = read_decoder(model, 48, "f32")
    assert verify_program(DecoderProgram(parts, max_tokens=8, context=48), model) < 0.02
    parts.rope[:, 1].neg_()
    with pytest.raises(RunError, match="LB0565"):
        verify_program(DecoderProgram(parts, max_tokens=8, context=48), model)


def test_numbers_of_16_bits_go_to_other_levels() -> None:
    """Coarse levels make much of the model's own rounding, which the program does not do."""
    model = _rounded("int4.token", torch.bfloat16)
    usual = verify.TOLERANCE[verify.ROUNDED] + 0.05
    assert usual < verify_program(DecoderProgram(read_decoder(model, 48, "f32"), max_tokens=8, context=48), model) < 0.3


def test_refusals_name_the_part() -> None:
    with pytest.raises(RunError, match=r"LB0560.*softcapping"):
        read_decoder(_tiny("Gemma2"), 32)
    plain = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    with pytest.raises(RunError, match=r"LB0560.*model.layers.0.*feedforward"):
        read_decoder(_tiny("Gemma2", **plain), 32)
    with pytest.raises(RunError, match="LB0560"):
        read_decoder(nn.Linear(4, 4), 32)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(RunError, match=r"LB0560.*dynamic"):
        read_decoder(tiny_llama(rope_parameters=rope), 32)
    with pytest.raises(KernelError, match="LB0430"):
        read_decoder(tiny_llama(), 32, "int4")
    with pytest.raises(KernelError, match=r"LB0430.*correction"):
        read_decoder(tiny_llama(), 32, "kv4.kc32.vt.w32.gear2r4")
    with pytest.raises(RunError, match=r"LB0560.*sliding"):
        read_decoder(_tiny("Mistral", sliding_window=6), 32, "kv4")
    quantized = swap_linears(tiny_llama(), "int4.g32.sym")
    with pytest.raises(RunError, match="LB0566"):
        lowbit.compile(quantized.train(), mode="program")
    with pytest.raises(RunError, match=r"LB0568.*'speed'"):
        lowbit.compile(quantized.eval(), mode="speed")
    with pytest.raises(RunError, match=r"LB0568.*'speed'"):
        lowbit.compile(quantized, mode="program", speed=1)
    for wrong in ({"context": 0}, {"threads": -1}, {"max_tokens": 0}):
        with pytest.raises(RunError, match=r"LB0568.*not positive"):
            lowbit.compile(quantized, mode="program", **wrong)
    with pytest.raises(RunError, match=r"LB0568.*'context'"):
        lowbit.compile(quantized, context=3)
    assert isinstance(quantized.model.layers[0].self_attn.q_proj, QuantLinear)  # nothing was changed


FORMATS = [*map(str, catalog()), "int4.g48.asym.f32", "mxfp4", "nvfp4", "int4.g64.sym.i8ch", "int4.g32.sym.perm"]
FORMATS += ["bcq2.g64", "bcq3.g80.f32", "bcq4.ch", "tcq2.g64", "tcq3.ch"]


@pytest.mark.parametrize("text", FORMATS)
def test_models_are_verified_with_the_numbers_of_the_reference(text: str) -> None:
    fmt = parse_format(text)
    weights = [random_weight(fmt, n, 192, torch.Generator().manual_seed(n)) for n in (40, 24)]
    packed = pack_weights(weights[: 1 if fmt.ordered else 2], LAYOUTS["panel16"])
    found = _decoded(packed)
    assert (found is None) == bool(fmt.channel)
    assert found is None or torch.equal(found, decode_stored(packed))
