"""`import lowbit` makes transformers know its checkpoints, whichever is imported first, without importing it."""

from __future__ import annotations

import subprocess
import sys

CHECK = """
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print('lowbit' in CONFIG_MAPPING, 'lowbit' in AUTO_QUANTIZER_MAPPING)
"""


def run_python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()


def test_registered_when_lowbit_comes_first() -> None:
    """transformers stays lazy, a second install does nothing, and its modules keep their own loaders."""
    lazy = "import lowbit, lowbit._hook, transformers, sys; lowbit._hook.install(); print('torch' in sys.modules)\n"
    module = "import transformers.modeling_utils as m\ns = m.__spec__\n"
    own = module + "print(type(s.loader).__name__, m.__loader__ is s.loader)"
    alone = run_python("import transformers, sys; print('torch' in sys.modules)")
    assert run_python(lazy + CHECK + own) == [*alone, "True True", "SourceFileLoader True"]


def test_registered_when_transformers_comes_first() -> None:
    first = "from transformers import AutoConfig\nfrom transformers import PreTrainedModel\nimport lowbit\n"
    assert run_python(first + CHECK)[-1] == "True True"
