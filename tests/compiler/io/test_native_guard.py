"""A native checkpoint loads with `import lowbit`, and by no route without it.

Every case is a Python process of its own, because registration is global; cases share a process where they can.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _models import swap_linears, tiny_llama

from lowbit.compiler.io.load import save_quantized

WITHOUT = """
import json, sys
if {block}:
    sys.modules["lowbit"] = None
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel
routes = {{
    "auto": lambda folder: AutoModelForCausalLM.from_pretrained(folder),
    "no trust": lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False),
    "trust": lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
    "base": lambda folder: AutoModel.from_pretrained(folder),
    "config": lambda folder: AutoConfig.from_pretrained(folder),
    "class": lambda folder: LlamaForCausalLM.from_pretrained(folder),
    "base class": lambda folder: LlamaModel.from_pretrained(folder),
}}
results = {{}}
for folder in {folders!r}:
    for name, route in routes.items():
        try:
            route(folder)
            results[f"{{name}} {{folder}}"] = "LOADED"
        except Exception as e:
            results[f"{{name}} {{folder}}"] = f"{{type(e).__name__}}: {{e}}"
print()
print(json.dumps(results))
"""

WITH = """
import copy, pickle, sys
import lowbit
assert "transformers" not in sys.modules
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM
import torch
folder, again = {folder!r}, {again!r}
ids = torch.arange(10)[None]
model = AutoModelForCausalLM.from_pretrained(folder)
assert type(model) is LlamaForCausalLM, type(model)
layer = model.model.layers[0].mlp.up_proj
assert type(layer).__name__ == "QuantLinear", type(layer)
with torch.no_grad():
    logits = model(ids).logits
    assert torch.equal(logits, lowbit.load(folder)(ids).logits)
    hidden = AutoModel.from_pretrained(folder)(ids).last_hidden_state
    assert torch.equal(model.lm_head(hidden), logits)
    assert model.config.model_type == "llama"
    assert type(copy.deepcopy(model.config)) is type(pickle.loads(pickle.dumps(model.config))) is type(model.config)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 13)
    model.save_pretrained(again)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(again)(ids).logits, logits)
print("ok")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native") / "out"
    return save_quantized(swap_linears(tiny_llama(), "int1.g20.sym"), out)


def python(code: str, home: Path) -> str:
    env = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_loads_with_lowbit_and_nowhere_without(folder: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert python(WITH.format(folder=str(folder), again=str(again)), tmp_path) == "ok"
    # `again` was written by save_pretrained, and is guarded all the same.
    results = json.loads(python(WITHOUT.format(folders=[str(folder), str(again)], block=True), tmp_path))
    assert len(results) == 14
    for route, result in results.items():
        assert result != "LOADED", route
        assert "lowbit" in result or "trust_remote_code" in result, (route, result)
    assert "import lowbit" in results[f"class {again}"]


def test_trusting_the_checkpoint_imports_lowbit(folder: Path, tmp_path: Path) -> None:
    """lowbit installed but not imported: the one route that runs the checkpoint's two lines of code loads it."""
    results = json.loads(python(WITHOUT.format(folders=[str(folder)], block=False), tmp_path))
    assert results[f"trust {folder}"] == "LOADED"
    assert results[f"no trust {folder}"] != "LOADED"
