"""The host side of the Triton kernels."""

import pytest
import torch

from omnimix.errors import UnsupportedShape
from omnimix.kernels.common import tools


@pytest.mark.parametrize("lengths", [[3], [64], [65], [1] * 9, [3, 64, 1, 64, 130], [128, 127]], ids=str)
def test_chunks_of_packed_sequences(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    table, first = tools.chunk_table(bounds, 64, sum(lengths))
    expected = [(s, c) for s, n in enumerate(lengths) for c in range(-(-n // 64))]
    assert [tuple(row) for row in table.tolist()[: len(expected)]] == expected
    assert all(sequence == len(lengths) for sequence, _ in table.tolist()[len(expected) :])
    assert first.tolist() == [expected.index((s, 0)) for s in range(len(lengths))]


def test_chunks_of_packed_sequences_without_data():
    table, first = tools.chunk_table(torch.empty(4, dtype=torch.int32, device="meta"), 64, 200)
    assert table.shape == (6, 2) and first.shape == (3,)


def test_a_kernel_is_not_tuned_by_length():
    with pytest.raises(ValueError, match="every length"):
        tools.tuned([{"num_warps": 4}], key=["K", "T"])
    with pytest.raises(ValueError, match="1 to 4"):
        tools.tuned([{"num_warps": 4}] * 5, key=["K"])


def test_one_config_under_the_interpreter():
    triton = pytest.importorskip("triton")
    tuner = tools.tuned([{"B": 16, "num_warps": 2}, {"B": 32}], key=["K"])(triton.jit(lambda x, K, B: None))
    (config,) = tuner.configs
    assert config.kwargs == {"B": 16} and config.num_warps == 2


def test_tiles_and_grids():
    assert [tools.tile(n) for n in (1, 16, 17, 128, 300)] == [16, 16, 32, 128, 128]
    assert tools.tile(65, 64) == 64
    assert tools.grid(70000, 3) == (70000, 3)
    with pytest.raises(UnsupportedShape, match="65535"):
        tools.grid(3, 70000)


def test_unit_stride_copies_only_where_it_must():
    x = torch.randn(2, 3, 4)
    turned = x.transpose(0, 1)
    assert tools.unit_stride(turned) is turned
    spread = tools.unit_stride(x.transpose(1, 2))
    assert spread.stride(-1) == 1 and torch.equal(spread, x.transpose(1, 2))
    assert tools.unit_stride(x[..., :1].expand(2, 3, 4)).stride(-1) == 1


def test_dot_modes_under_the_interpreter():
    assert tools.dot_mode(torch.float64) == "float64"
    assert {tools.dot_mode(d) for d in (torch.bfloat16, torch.float16, torch.float32)} == {"ieee"}


def test_launchers_run_on_fake_tensors_only_ahead_of_time():
    fake = tools.launches(lambda x: "launched")(lambda x: "shapes")
    assert fake(1) == "shapes"
    with tools.launching_ahead():
        assert fake(1) == "launched"
    assert fake(1) == "shapes"
