"""Which moments of a video are chosen: spread, order, seeds, several views."""

from itertools import pairwise

import pytest

from omnimix.errors import ConfigError
from omnimix.modalities import Dense, Segments, Uniform, views


def test_samplings():
    assert Uniform(4).times(8.0) == [1.0, 3.0, 5.0, 7.0]
    assert Segments(4).times(8.0) == [1.0, 3.0, 5.0, 7.0]
    assert Dense(4, 2.0).times(8.0) == [3.25, 3.75, 4.25, 4.75]
    assert Dense(4, 2.0).times(1.0) == [0.25, 0.75, 1.25, 1.75]
    for sampling in (Uniform(5), Segments(5), Dense(5, 3.0)):
        drawn = [sampling.times(9.0, seed) for seed in range(50)]
        assert drawn == [sampling.times(9.0, seed) for seed in range(50)]
        assert len({tuple(times) for times in drawn}) == 50
        assert all(0 <= times[0] and times[-1] < 9.0 and times == sorted(times) for times in drawn)
    steps = [later - earlier for earlier, later in pairwise(Segments(5).times(9.0, 1))]
    assert max(steps) - min(steps) > 0.05
    assert all(index == int(time / 1.8) for index, time in enumerate(Segments(5).times(9.0, 3)))
    starts = [Dense(5, 3.0).times(9.0, seed)[0] for seed in range(200)]
    assert min(starts) < 0.5 and max(starts) > 7.0


def test_views_cover_the_video():
    windows = views(10.0, Dense(4, 2.0), 5)
    assert [times[0] for times in windows] == pytest.approx([0.25, 2.25, 4.25, 6.25, 8.25])
    assert sorted(time for times in views(8.0, Uniform(4), 2) for time in times) == [0.5 + index for index in range(8)]
    for sampling in (Uniform(4), Segments(4), Dense(4, 2.0)):
        assert views(8.0, sampling, 1) == [sampling.times(8.0)]
    assert views(0.0, Uniform(2), 2) == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Uniform(0), "frames is 0"),
        (lambda: Segments(-1), "frames is -1"),
        (lambda: Dense(4, 0.0), "rate is 0.0"),
        (lambda: Uniform(4).times(-1.0), "duration is -1.0"),
        (lambda: views(1.0, Uniform(4), 0), "count is 0"),
    ],
)
def test_wrong_arguments(call, words):
    with pytest.raises(ConfigError, match=words):
        call()
