"""Law 8 under torch.compile.

Run by test_law_8.py in a process of its own: torch.compile cannot trace the shape checks that other tests run under.
"""

from __future__ import annotations

import pytest
import torch

from omnimix.kernels.check import error

from .subjects import BOTH, CAUSAL, Subject, both_way_subjects, causal_subjects, floating, tokens


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()


@causal_subjects
def test_a_mixer_compiles_whole(subject: Subject):
    module = subject.module()
    x = tokens(2, 9)
    with torch.no_grad():
        _, state = module(tokens(2, 3, seed=1), CAUSAL)

    def step(x, state):
        y, after = module(x, CAUSAL, state)
        return y, after

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for before in (None, state):
        plain = x.clone().requires_grad_(), x.clone().requires_grad_()
        (y, after), (z, wanted) = compiled(plain[0], before), step(plain[1], before)
        assert error(y, z) < 1e-12
        assert all(error(a, b) < 1e-12 for a, b in zip(floating(after), floating(wanted), strict=True))
        y.square().sum().backward()
        z.square().sum().backward()
        assert error(plain[0].grad, plain[1].grad) < 1e-12


@both_way_subjects
def test_a_mixer_compiles_whole_both_ways(subject: Subject):
    module = subject.module()
    x = tokens(2, 10)
    compiled = torch.compile(lambda x: module(x, BOTH)[0], fullgraph=True, backend="aot_eager")
    assert error(compiled(x), module(x, BOTH)[0]) < 1e-12
