"""Sequences that are short at the beginning of a run."""

import pytest
import torch

from omnimix.recipes.text.lengths import cut, length_at, scored


def test_lengths_double_up_to_the_longest():
    lengths = [length_at(step, growing=8, longest=400) for step in range(10)]
    assert lengths == [32, 32, 64, 64, 128, 128, 256, 256, 400, 400]
    assert length_at(0, growing=0, longest=400) == 400
    assert length_at(3, growing=4, longest=20) == 32


def test_rows_are_cut_where_the_next_begins_with_the_last_token():
    batch = {"tokens": torch.arange(22).view(2, 11), "counted": torch.arange(22).view(2, 11) % 2 == 0}
    assert scored(batch) == 10 and cut(batch, 10) is batch
    short = cut(batch, 4)
    assert short["tokens"].tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [11, 12, 13, 14, 15], [15, 16, 17, 18, 19]]
    assert torch.equal(short["counted"], short["tokens"] % 2 == 0)


def test_rows_that_are_filled_up_keep_what_is_scored():
    batch = {"tokens": torch.arange(27).view(3, 9), "lengths": torch.tensor([9, 5, 6])}
    short = cut(batch, 4)
    assert short["tokens"][:, 0].tolist() == [0, 4, 9, 18, 22]
    assert short["lengths"].tolist() == [5, 5, 5, 5, 2]
    assert int((short["lengths"] - 1).sum()) == int((batch["lengths"] - 1).sum())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_sequences_get_more_borders(dtype):
    batch = {"tokens": torch.arange(12)[None], "cu_seqlens": torch.tensor([0, 7, 9, 12], dtype=dtype)}
    assert scored(batch) == 6
    short = cut(batch, 2)
    assert short["cu_seqlens"].tolist() == [0, 3, 6, 7, 9, 12] and short["cu_seqlens"].dtype == dtype
    assert short["tokens"] is batch["tokens"]


def test_a_batch_whose_scored_tokens_would_be_dropped_stays_whole():
    counted = torch.zeros(1, 93, dtype=torch.bool)
    counted[0, 90:] = True
    batch = {"tokens": torch.arange(93)[None], "counted": counted}
    assert cut(batch, 32) is batch
    counted[0, 40] = True
    assert cut(batch, 32)["tokens"].shape == (2, 33)
