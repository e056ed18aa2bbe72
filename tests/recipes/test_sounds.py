"""The default sounds, and the model that is blind to their order."""

import pytest
import torch

from omnimix.modalities.audio.mel import LogMel, MelConfig
from omnimix.recipes.audio.order_blind import FrameBag, order_blind
from omnimix.recipes.audio.sounds import BLIND, RATE, SECONDS, SOUNDS, Split, draw_sounds
from omnimix.recipes.common.media import Samples


def tone(hertz, seconds, rate=8000):
    at = torch.arange(round(seconds * rate))
    return 0.5 * torch.sin(2 * torch.pi * hertz * at / rate) * torch.hann_window(len(at))


def test_the_order_of_sounds_is_their_class():
    assert len(SOUNDS) == 12 and pytest.approx(5 / 12) == BLIND
    split = Split(name="val", clips=4, voices=2, seed=3)
    for name in ("u-o-a", "mid-high-low", "pipe-pluck"):
        waves = draw_sounds(name, split)
        assert all(0.4 * RATE < len(wave) <= SECONDS * RATE and 0 < wave.abs().max() <= 1 for wave in waves)
        assert len({len(wave) for wave in waves}) > 1
        assert all(map(torch.equal, waves, draw_sounds(name, split)))
    mel = LogMel(MelConfig.whisper(bins=40))
    rising, falling = (
        torch.stack([mel(w[None])[0].exp().argmax(-1).float() for w in [_loudest(w) for w in draw_sounds(n, split)]])
        for n in ("low-mid-high", "high-mid-low")
    )
    half = rising.shape[1] // 2
    assert (rising[:, half:].mean() > rising[:, :half].mean()) and (falling[:, half:].mean() < falling[:, :half].mean())


def _loudest(wave, length=6400):
    """The 0.4 seconds with the most sound."""
    power = torch.nn.functional.avg_pool1d(wave.square()[None], length, stride=100)[0]
    start = 100 * int(power.argmax())
    return wave[start : start + length]


def test_a_model_blind_to_order_is_blind_to_order():
    mel = torch.randn(3, 11, 8)
    model = FrameBag(8, 4)
    torch.testing.assert_close(model(mel), model(mel[:, torch.randperm(11)]), rtol=1e-4, atol=1e-5)

    class Pairs:
        """Two tones, one after the other; the class is which comes first, or with `apart` which they are."""

        classes = ("a", "b")

        def __init__(self, apart, first):
            self.apart, self.first = apart, first

        def __len__(self):
            return 128

        def name(self, index):
            return str(index)

        def label(self, index):
            return index % 2

        def media(self, index):
            at, generator = index // 2, torch.Generator().manual_seed(self.first + index)
            # Ends that are sharp, or alike in all clips, would tell.
            first = round(0.15 + 0.1 * float(torch.rand((), generator=generator)), 3)
            parts = [tone(250 + 2 * at, first), tone(1000 + 10 * at, 0.4 - first)]
            wave = torch.cat(parts[:: 1 - 2 * (index % 2)])
            if self.apart:
                wave = tone(250 if index % 2 else 1000, 0.4)
            return wave + 0.1 * torch.randn(wave.shape, generator=generator)

    for apart in (True, False):
        train, val = (Samples(Pairs(apart, first), lambda wave, seed: {"audio": wave}) for first in (0, 1000))
        found = order_blind(train, val, LogMel(MelConfig.whisper(rate=8000, bins=16)), classes=2, epochs=40, seed=0)
        assert (found.acc1 == 1.0) if apart else (found.acc1 < 0.75)
