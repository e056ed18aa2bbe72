"""What a mixer does not declare raises, for every registered mixer and for hybrids."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from omnimix.backbones import Layout
from omnimix.errors import UnsupportedCall, UnsupportedShape

from .subjects import CAUSAL, Subject, both_way_subjects, capability, causal_subjects, tokens

BORDERS = torch.tensor([0, 1, 6, 9], dtype=torch.int32)


@causal_subjects
def test_what_is_not_declared_raises(subject: Subject):
    module = subject.module()
    x = tokens(2, 9)
    if capability(module, "blockwise"):
        module(x, Layout(causal="block", block=3))
    else:
        with pytest.raises(UnsupportedCall, match="scan='bidirectional' for mixers that scan, .*'attention'"):
            module(x, Layout(causal="block", block=3))
    with pytest.raises(UnsupportedShape, match="batch 1"):
        module(x, Layout(cu_seqlens=BORDERS))
    _, state = module(x, CAUSAL)
    with pytest.raises(UnsupportedShape, match="2 sequences"):
        module(tokens(3, 1), CAUSAL, state)
    if not capability(module, "bidirectional"):
        with pytest.raises(UnsupportedCall, match="scan='bidirectional'"):
            module(x, Layout(causal=False))


@both_way_subjects
def test_several_directions_refuse_causal(subject: Subject):
    module = subject.module()
    run = partial(module, tokens(2, 9), CAUSAL)
    if capability(module, "causal"):
        run()
    else:
        with pytest.raises(UnsupportedCall, match="scan='forward'"):
            run()
