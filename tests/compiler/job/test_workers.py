"""Workers: the same results, whatever their number."""

from __future__ import annotations

import pytest
import torch
from _models import tiny_llama

from lowbit.compiler.errors import CheckpointError
from lowbit.compiler.job.inmemory import choose
from lowbit.compiler.job.workers import Workers
from lowbit.quantizers.formats import parse_format
from lowbit.quantizers.methods import make_method
from lowbit.quantizers.scheme import Scheme
from lowbit.quantizers.weights import stored


def test_results_do_not_depend_on_the_number_of_workers() -> None:
    ids = torch.randint(0, 80, (8, 48), generator=torch.Generator().manual_seed(0))
    chosen = Scheme("test", parse_format("vq.d4.k16"), "vptq", {"refit": 1})
    runs = [choose(tiny_llama(), chosen, ids, sequential=False, workers=count).layers for count in (1, 2)]
    assert list(runs[0]) == list(runs[1])
    for path, (q, entry) in runs[0].items():
        again, other = runs[1][path]
        assert all(torch.equal(a, b) for a, b in zip(stored(q).values(), stored(again).values(), strict=True))
        assert entry.proxy_error == other.proxy_error


def test_errors_of_workers_are_errors_here() -> None:
    with Workers(2) as pool, pytest.raises(CheckpointError, match="LB0107"):
        pool.submit(make_method("rtn", {}), torch.full((4, 32), torch.nan), parse_format("int4.g32.sym"), None)()
