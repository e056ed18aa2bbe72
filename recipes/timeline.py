"""What happens when: stretches of time that follow each other, put together by what a model says of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor


class Said(Protocol):
    """A stretch of time, in seconds, and what a model says of it: the probability of each class."""

    @property
    def start(self) -> float: ...

    @property
    def stop(self) -> float: ...

    @property
    def probabilities(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Stretches one after the other of one class.

    Args:
        start, stop: seconds.
        label: index of the class.
        probability: of the class, on average over the stretches.
        moments: how many.
    """

    start: float
    stop: float
    label: int
    probability: float
    moments: int = 1


def scenes(moments: Iterable[Said]) -> Iterator[Scene]:
    """Stretches one after the other of the same likeliest class, put together; each as soon as another class follows.

    What an iterator gives is read no further than to there.
    """
    scene: Scene | None = None
    for moment in moments:
        probability, label = (value.item() for value in moment.probabilities.max(0))
        if scene is not None and scene.label == label:
            count = scene.moments + 1
            mean = scene.probability + (probability - scene.probability) / count
            scene = replace(scene, stop=moment.stop, probability=mean, moments=count)
            continue
        if scene is not None:
            yield scene
        scene = Scene(start=moment.start, stop=moment.stop, label=int(label), probability=probability)
    if scene is not None:
        yield scene
