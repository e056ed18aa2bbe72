"""The order-blind baseline: a classifier that sees the frames of a sound as a set."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...modalities.audio.mel import LogMel
from ...utils.console import say
from ..common.classification import Baseline
from ..common.loading import mix
from ..common.media import Samples

# Training sounds that are used, evenly chosen; more do not change the result.
_MOST = 4096
_BATCH, _WIDTH, _RATE = 64, 96, 3e-3


class FrameBag(nn.Module):
    """Logits from the frames of a spectrogram as a set (Deep Sets, arXiv 1703.06114): no order of them changes them."""

    def __init__(self, bins: int, classes: int):
        super().__init__()
        self.frames = nn.Sequential(nn.Linear(bins, _WIDTH), nn.GELU(), nn.Linear(_WIDTH, _WIDTH), nn.GELU())
        self.head = nn.Sequential(nn.Linear(3 * _WIDTH, _WIDTH), nn.GELU(), nn.Linear(_WIDTH, classes))

    def forward(self, mel: Float[Tensor, "b t bins"]) -> Float[Tensor, "b classes"]:
        x = self.frames(mel)
        return self.head(torch.cat([x.mean(1), x.std(1, correction=0), x.amax(1)], dim=1))


def order_blind(train: Samples, val: Samples, mel: LogMel, *, classes: int, epochs: int, seed: int) -> Baseline:
    """Train the baseline on training sounds without augmentation, and evaluate it on the held-out ones.

    Args:
        train, val: samples with their wave as `audio`; unreadable files are left out.
        mel: the spectrogram.
        seed: of weights and order.
    """
    say(f"training the order-blind baseline, epochs: {epochs}")
    begun = time.monotonic()
    every = max(1, -(-len(train) // _MOST))
    spectrograms, labels = _hear(train, range(0, len(train), every), mel)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FrameBag(mel.config.bins, classes)
    optimiser = torch.optim.AdamW(model.parameters(), lr=_RATE)
    batches = max(1, len(labels) // _BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs * batches)
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(mix(seed, epoch)))
        for chosen in order[: batches * _BATCH].split(_BATCH):
            loss = F.cross_entropy(_logits(model, spectrograms, chosen), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    with torch.inference_mode():
        spectrograms, labels = _hear(val, range(len(val)), mel)
        said = [_logits(model, spectrograms, chosen).argmax(-1) for chosen in torch.arange(len(labels)).split(_BATCH)]
    acc1 = float((torch.cat(said) == labels).float().mean())
    return Baseline(name="order unheard", acc1=acc1, seconds=time.monotonic() - begun)


def _hear(samples: Samples, indices: range, mel: LogMel) -> tuple[list[Float[Tensor, "t bins"]], Int[Tensor, " n"]]:
    spectrograms, labels = [], []
    for index in indices:
        sample = samples[0, index]
        if sample["problem"] is None:
            spectrograms.append(mel(sample["audio"][None])[0])
            labels.append(sample["label"])
    return spectrograms, torch.tensor(labels)


def _logits(
    model: FrameBag, spectrograms: list[Float[Tensor, "_ bins"]], chosen: Int[Tensor, " b"]
) -> Float[Tensor, "b classes"]:
    """Logits of clips: of one length in one batch, of several lengths one by one."""
    batch = [spectrograms[i] for i in chosen.tolist()]
    if len({len(clip) for clip in batch}) == 1:
        return model(torch.stack(batch))
    return torch.cat([model(clip[None]) for clip in batch])
