"""Law 12: a mixer is its paper. See `omnimix.backbones.mixers.reference`."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from omnimix.backbones import Layout, list_mixers
from omnimix.backbones.mixers import MIXERS, get_mixer
from omnimix.cli.check_kernels import error, results

from .checker import TOLERANCE, assert_equal
from .subjects import DEPTH, Alone, Subject, arguments, call, capability, mixer_subjects, tokens

# Long enough for the examples' windows, blocks of keys and mini-batches to matter, with a last one that is not full.
TIME = 11


def reference_of(subject: Subject, module: Alone, causal: bool):
    """The subject's reference as a function of `arguments`."""
    reference = get_mixer(subject.mixer).reference
    assert reference is not None, f"{subject.mixer} is registered without reference=; law 12 needs one"
    wrapped = _Reference(module, partial(reference, config=subject.config, causal=causal))
    return lambda *, x, **parameters: (functional_call(wrapped, parameters, (x,)),)


class _Reference(torch.nn.Module):
    """A reference with the parameters of a mixer, under the names that `Alone` gives them."""

    def __init__(self, module: Alone, function):
        super().__init__()
        self.inner, self.function = module.inner, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.inner, x=x)


def equals_its_reference(subject: Subject, causal: bool) -> None:
    """Outputs, and gradients with respect to the tokens and every parameter."""
    module = subject.module()
    layout, given = Layout(causal=causal), arguments(module, tokens(2, TIME))
    truth = results(reference_of(subject, module, causal), given)
    assert_equal(results(call(module, layout, keep=False), given), truth)
    with torch.inference_mode():
        e = error(module(given["x"], layout)[0], truth.outputs[0])
    assert e <= TOLERANCE, f"under inference mode the relative error is {e:.1e}"


def equals_its_reference_token_by_token(subject: Subject) -> None:
    """Streamed under inference mode, where the kernels' steps for one token serve."""
    module, x = subject.module(), tokens(2, TIME)
    truth = reference_of(subject, module, True)(x=x, **dict(module.named_parameters()))[0]
    assert capability(module, "streaming")
    with torch.inference_mode():
        state, outputs = None, []
        for token in x.split(1, dim=1):
            y, state = module(token, Layout(causal=True), state)
            outputs.append(y)
        e = error(torch.cat(outputs, dim=1), truth)
    assert e <= TOLERANCE, f"token by token the relative error is {e:.1e}"


ENDS = (0, DEPTH - 1)


def ends(scan: str) -> pytest.MarkDecorator:
    """A test of each mixer, example and layer; `make test-fast` has the last layer of the first example."""
    last = f"-0-layer-{DEPTH - 1}"
    marked = [
        pytest.param(s, marks=[] if s.name.endswith(last) else pytest.mark.slow) for s in mixer_subjects(scan, ENDS)
    ]
    return pytest.mark.parametrize("subject", marked, ids=lambda s: s.name)


@ends("forward")
def test_law_12_a_mixer_is_its_paper(subject: Subject):
    equals_its_reference(subject, causal=True)
    equals_its_reference_token_by_token(subject)


@ends("bidirectional")
def test_law_12_a_mixer_is_its_paper_both_ways(subject: Subject):
    equals_its_reference(subject, causal=False)


def test_a_mixer_without_a_reference_breaks_law_12(monkeypatch: pytest.MonkeyPatch):
    covered = {subject.mixer for subject in mixer_subjects("forward", ENDS)}
    assert covered == set(list_mixers())
    subject = next(s for s in mixer_subjects() if s.mixer == "gla")
    monkeypatch.setitem(MIXERS._entries, "gla", dataclasses.replace(get_mixer("gla"), reference=None))
    with pytest.raises(AssertionError, match="without reference="):
        equals_its_reference(subject, causal=True)
