"""What is computed and not learned does not depend on torch's default dtype, which bf16-true training changes."""

from __future__ import annotations

import contextlib

import pytest
import torch

from omnimix.backbones import Backbone, BackboneConfig, Layout
from omnimix.backbones.mixers import get_mixer, list_mixers
from omnimix.backbones.rotary import RopeScaling, frequencies
from omnimix.backbones.scan import grid_permutation
from omnimix.kernels.common.chunked_plan import reversed_sum
from omnimix.modalities.audio.convolution import sinusoids as sound_sinusoids
from omnimix.modalities.video.tokenizer import sinusoids as video_sinusoids

from ..laws.zeros import without_zeros


@contextlib.contextmanager
def default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "make",
    [
        lambda: frequencies(32),
        lambda: frequencies(32, scaling=RopeScaling(factor=4.0)),
        lambda: sound_sinusoids(500, 16, start=3, device=CPU),
        lambda: video_sinusoids(500, 16, 3),
        lambda: reversed_sum(5, torch.float32, CPU),
        lambda: grid_permutation("hilbert", (1, 4, 4), ())[0],
    ],
    ids=["rotary", "yarn", "sound", "video", "sums", "hilbert"],
)
def test_constants_are_the_same(make, dtype):
    right = make()
    reversed_sum.cache_clear()
    with default(dtype):
        found = make()
    assert found.dtype == right.dtype and torch.equal(found, right)


@pytest.mark.parametrize("name", list_mixers())
def test_what_a_mixer_computes_is_the_same(name):
    torch.manual_seed(0)
    entry = get_mixer(name)
    config = BackboneConfig(dim=48, depth=1, pattern=[name], mixers={name: entry.examples[0]}, ffn="moe")
    causal = without_zeros(Backbone(config))
    x, layout = torch.randn(2, 9, 48), Layout(causal=True)
    with torch.no_grad():
        right = causal(x, layout)
        with default(torch.bfloat16):
            found = causal(x, layout)
            after = causal(x[:, :1], layout, right.state)
        assert found.y.dtype == torch.float32 and torch.equal(found.y, right.y)
        assert torch.equal(after.y, causal(x[:, :1], layout, right.state).y)
