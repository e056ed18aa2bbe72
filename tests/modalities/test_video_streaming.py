"""A video chunk by chunk is the video at once, in memory that does not grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from omnimix.backbones import list_mixers
from omnimix.backbones.mixers import get_mixer
from omnimix.errors import UnsupportedCall, UnsupportedShape
from omnimix.modalities import build_model, video_classifier

from ..laws.zeros import without_zeros

SMALL = {"dim": 32, "depth": 1, "classes": 3, "size": (4, 16, 16), "tubelet": (2, 8, 8), "causal": True}
# Small options, with windows and blocks shorter than the videos.
MIXERS = {name: get_mixer(name).examples[0] for name in list_mixers()}


def model_of(mixer: str, dtype: torch.dtype = torch.float64, **options):
    torch.manual_seed(0)
    config = video_classifier(mixer=mixer, **SMALL | options)
    backbone = type(config.backbone)(**vars(config.backbone) | {"mixers": {mixer: MIXERS[mixer]}})
    model = build_model(type(config)(video=config.video, backbone=backbone, head=config.head))
    return without_zeros(model).to(dtype).eval()


def streamed(model, x: torch.Tensor, lengths: list[int]):
    """Logits of all steps, logits of the whole, and the states between, when frames come so many at a time."""
    state, now, states = None, [], []
    for chunk in x.split(lengths, dim=2):
        step = model.stream(chunk, state)
        state = step.state
        now.append(step.now)
        states.append(state)
    last = model.finish(state)
    return torch.cat([*now, last.now], dim=1), last.so_far, states


@pytest.mark.parametrize("mixer", list_mixers())
@torch.no_grad()
def test_chunks_are_the_whole(mixer):
    model = model_of(mixer)
    x = torch.randn(2, 3, 9, 16, 8, dtype=torch.float64)
    if not model.backbone.capabilities.streaming:
        with pytest.raises(UnsupportedCall, match="state"):
            model.stream(x)
        return
    tokens, layout = model.forward_features(x)
    steps = model.head_of(tokens.unflatten(1, (layout.grid[0], -1)).mean(2))
    # A frame waits after each.
    now, so_far, states = streamed(model, x, [3, 4, 0, 2])
    torch.testing.assert_close(now, steps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(so_far, model.forward_head(tokens, layout), rtol=1e-9, atol=1e-9)
    assert [(s.steps, s.waiting.shape[2]) for s in states] == [(1, 1), (3, 1), (3, 1), (4, 1)]
    assert (len({state.nbytes for state in states}) == 1) == model.backbone.capabilities.constant_state


@torch.no_grad()
def test_logits_so_far_are_those_of_the_video_so_far():
    model = model_of("gla")
    x = torch.randn(1, 3, 6, 16, 16, dtype=torch.float64)
    first = model.stream(x[:, :, :1])
    assert first.so_far is None and first.now.shape == (1, 0, 3) and first.state.steps == 0
    step = model.stream(x[:, :, 1:4], first.state)
    torch.testing.assert_close(step.so_far, model(x[:, :, :4]))
    assert step.now.shape == (1, 2, 3)
    whole = model.finish(model.stream(x[:, :, 4:], step.state).state)
    assert whole.now.shape == (1, 0, 3)
    torch.testing.assert_close(whole.so_far, model(x))
    in_float32 = model.float()
    now, so_far, _ = streamed(in_float32, x.float(), [1] * 6)
    assert now.shape == (1, 3, 3)
    torch.testing.assert_close(so_far, in_float32(x.float()), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_fewer_tokens_stream_too():
    """Frames wait until they fill a group of tubelets; at the end a smaller group is averaged as in the whole."""
    model = model_of("mamba", group=(2, 1, 2), merge=3)
    x = torch.randn(2, 3, 11, 24, 24, dtype=torch.float64)
    assert model.config.video.step == 4
    _, so_far, states = streamed(model, x, [3, 2, 6])
    torch.testing.assert_close(so_far, model(x))
    assert [(s.steps, s.waiting.shape[2]) for s in states] == [(0, 3), (1, 1), (2, 3)]


def test_the_gradient_flows_through_the_state():
    model = model_of("mamba2")
    x = torch.randn(1, 3, 6, 16, 16, dtype=torch.float64, requires_grad=True)
    _, so_far, states = streamed(model, x, [3, 3])
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    (pieces,) = torch.autograd.grad((so_far * weights).sum(), x)
    (whole,) = torch.autograd.grad((model(x) * weights).sum(), x)
    torch.testing.assert_close(pieces, whole)
    cut = states[0].detach()
    assert cut.nbytes == states[0].nbytes and not cut.total.requires_grad
    (later,) = torch.autograd.grad((model.stream(x[:, :, 3:], cut).so_far * weights).sum(), x)
    assert (later[:, :, :3] == 0).all() and (later[:, :, 3:] != 0).any()


def test_what_cannot_stream_says_so():
    x = torch.randn(1, 3, 4, 16, 16)
    whole = build_model(video_classifier(mixer="gla", **SMALL | {"causal": False}))
    with pytest.raises(UnsupportedCall, match="causal=True"):
        whole.stream(x)
    with pytest.raises(UnsupportedCall, match="'max'"):
        model_of("gla", torch.float32, pool="max").stream(x)
    model = model_of("gla", torch.float32)
    state = model.stream(x).state
    with pytest.raises(UnsupportedShape, match="that of the stream"):
        model.stream(x[..., :8], state)
    with pytest.raises(UnsupportedShape, match="channels"):
        model.stream(x[:, :1], state)


_LONG = """
import json, resource, torch
from omnimix.modalities import build_model, video_classifier
torch.manual_seed(0)
config = video_classifier(
    mixer="mamba", dim=64, depth=2, classes=10, size=(16, 32, 32), tubelet=(2, 16, 16), ffn=None, causal=True
)
model = build_model(config).eval().requires_grad_(False)
model.head.classifier.weight.mul_(50)

def chunks():  # sixty seconds at 25 frames a second
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        yield torch.randn(1, 3, 50, 32, 32, generator=generator)

state, now, sizes, peaks = None, [], set(), []
for chunk in chunks():
    step = model.stream(chunk, state)
    state = step.state
    now.append(step.now)
    sizes.add(state.nbytes)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
so_far = model.finish(state).so_far
tokens, layout = model.forward_features(torch.cat(list(chunks()), dim=2))
steps = model.head_of(tokens.unflatten(1, (layout.grid[0], -1)).mean(2))
errors = [so_far - model.forward_head(tokens, layout), torch.cat(now, dim=1) - steps]
print(json.dumps({
    "growth": peaks[-1] - peaks[4],
    "sizes": len(sizes),
    "steps": state.steps,
    "error": max(float(e.abs().max()) for e in errors),
    "scale": float(so_far.abs().max()),
}))
"""


def test_a_minute_is_streamed_as_the_whole_in_constant_memory():
    """In a process of its own, for its peak of memory after ten seconds and after sixty."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _LONG], capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["error"] < 1e-4 < 0.1 < found["scale"] and found["steps"] == 750
    # The frames of the fifty seconds between are 15 MB.
    assert found["sizes"] == 1 and found["growth"] < 4e6
