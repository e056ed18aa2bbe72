"""The laws under `Layout(causal="block")`, for everything that declares `blockwise`."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from omnimix.backbones import Layout
from omnimix.cli.check_kernels import error, results
from omnimix.errors import ConfigError, UnsupportedCall

from .checker import assert_equal
from .subjects import (
    CAUSAL,
    Subject,
    arguments,
    both_way_subjects,
    call,
    capability,
    causal_subjects,
    floating,
    leaves,
    parametrised,
    subjects,
    tokens,
)

SIZE = 3
BLOCKS = Layout(causal="block", block=SIZE)
# Lengths of which one is a whole number of blocks.
LENGTHS = (1, 5, 3)
PACKED = Layout(causal="block", block=SIZE, cu_seqlens=torch.tensor([0, 1, 6, 9], dtype=torch.int32))


with torch.device("meta"):
    BLOCKWISE = [s for s in subjects("bidirectional") if capability(s.build(), "blockwise")]
blockwise_subjects = parametrised(BLOCKWISE)


@blockwise_subjects
def test_law_2_block_by_block_is_the_whole(subject: Subject):
    module = subject.module()

    def in_pieces(*, x, **parameters):
        outputs, state = [], module.init_state(2, device=torch.device("cpu"), dtype=x.dtype)
        for piece in x.split([3, 6, 2], dim=1):
            y, state = functional_call(module, parameters, (piece, BLOCKS, state))
            outputs.append(y)
        return (torch.cat(outputs, dim=1), *floating(state))

    given = arguments(module, tokens(2, 11))
    assert_equal(results(in_pieces, given), results(call(module, BLOCKS), given))


@blockwise_subjects
def test_law_2_rows_go_on_from_one_selected_state(subject: Subject):
    module = subject.module()
    _, state = module(tokens(2, 6), BLOCKS)
    index, x = torch.tensor([1, 1]), tokens(2, 5, seed=1)
    y, _ = module(x, BLOCKS, state.select(index))
    for i in range(2):
        whole = torch.cat([tokens(2, 6)[1:], x[i : i + 1]], dim=1)
        assert error(y[i : i + 1], module(whole, BLOCKS)[0][:, 6:]) < 1e-9


@blockwise_subjects
def test_law_3_packed_is_each_alone(subject: Subject):
    module = subject.module()

    def each_alone(*, x, **parameters):
        outputs = []
        for first, second in zip(x[:, :9].split(list(LENGTHS), 1), x[:, 9:].split(list(LENGTHS), 1), strict=True):
            y, state = functional_call(module, parameters, (first, BLOCKS))
            z, state = functional_call(module, parameters, (second, BLOCKS, state))
            outputs.append((y, z))
        return tuple(torch.cat(part, dim=1) for part in zip(*outputs, strict=True))

    def together(*, x, **parameters):
        y, state = functional_call(module, parameters, (x[:, :9], PACKED))
        z, _ = functional_call(module, parameters, (x[:, 9:], PACKED, state))
        return y, z

    given = arguments(module, tokens(1, 18))
    assert_equal(results(together, given), results(each_alone, given))


@blockwise_subjects
def test_law_4_a_token_sees_its_block_and_what_came_before(subject: Subject):
    module = subject.module()
    # A row for each output; rows are independent by law 5.
    x = tokens(1, 8).repeat(8, 1, 1).requires_grad_()
    place = torch.arange(8)
    y, _ = module(x, BLOCKS)
    (reached,) = torch.autograd.grad(y[place, place].sum(), x)
    last = (place // SIZE * SIZE + SIZE - 1).clamp(max=7)[:, None]
    seen = place <= last
    if field := capability(module, "receptive_field"):
        seen &= (last - place < field) | (place < getattr(module.inner, "sinks", 0))
    assert torch.equal(reached.abs().amax(-1) > 0, seen)


@blockwise_subjects
def test_one_block_is_both_ways(subject: Subject):
    module = subject.module()
    given = arguments(module, tokens(2, 8))
    one = Layout(causal="block", block=11)
    if capability(module, "receptive_field"):
        with pytest.raises(UnsupportedCall, match="window=11"):
            module(given["x"], one)
    else:
        found = results(call(module, one, keep=False), given)
        assert_equal(found, results(call(module, Layout(causal=False), keep=False), given))


@causal_subjects
def test_blocks_of_one_token_are_causal(subject: Subject):
    module = subject.module()
    ones = Layout(causal="block", block=1)
    x = tokens(2, 9)
    y, state = module(x, CAUSAL)
    _, before = module(x[:, :3], ones)
    z, after = module(x[:, 3:], ones, before)
    assert error(z, y[:, 3:]) < 1e-9
    assert all(error(a, b) < 1e-9 for a, b in zip(floating(after), floating(state), strict=True))


@both_way_subjects
def test_scans_both_ways_have_a_state_under_blocks_only(subject: Subject):
    module = subject.module()
    x = tokens(2, 8)
    if not capability(module, "blockwise"):
        with pytest.raises(UnsupportedCall, match="'attention', 'window'"):
            module(x, BLOCKS)
        return
    _, state = module(x, BLOCKS)
    assert leaves(state)
    with pytest.raises(UnsupportedCall, match="'block'"):
        module(x, Layout(causal=False), state)


def test_a_block_has_tokens():
    with pytest.raises(ConfigError, match="at least 1"):
        Layout(causal="block", block=0)
