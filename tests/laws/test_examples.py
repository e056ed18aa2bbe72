"""The examples of a mixer reach every branch of its file, so that the laws see all of it."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from omnimix.backbones import Backbone, BackboneConfig, BlockConfig, Layout, list_mixers, mixers
from omnimix.backbones.mixers import get_mixer, parts
from omnimix.backbones.mixers.parts import compress

from .reached import lines_of_functions, lines_reached, ranges
from .subjects import CAUSAL, DIM, Alone, capability, subjects, tokens

BORDERS = torch.tensor([0, 1, 6, 9], dtype=torch.int32)
ROOT = Path(__file__).parents[2]
PARTS = Path(parts.__file__).parent


def run_everything(name: str) -> None:
    """Every way in which the laws call a mixer, in each of its examples: built anew, forwards and back, streamed."""
    for config in get_mixer(name).examples:
        # The second of its kind may read what the first one shares.
        entry = BlockConfig(mixer=dataclasses.replace(config), ffn=None)
        Backbone(BackboneConfig(dim=DIM, depth=2, pattern=[entry])).double()(tokens(1, 5), CAUSAL)
    for scan in ("forward", "bidirectional"):
        for subject in subjects(scan):
            if subject.mixer != name:
                continue
            module = Alone(subject.build()).double()
            for layout, x in _layouts(module):
                y, state = module(x.clone().requires_grad_(), layout)
                y.sum().backward()
                if state is not None and capability(module, "streaming"):
                    module(x, layout, state)
                with torch.inference_mode():
                    y, state = module(x, layout)
                    if layout is CAUSAL and capability(module, "streaming"):
                        for token in x[:, :3].split(1, dim=1):
                            # A second continuation of the same state.
                            module(token, layout, state)
                            _, state = module(token, layout, state)
            if capability(module, "causal"):
                module(tokens(2, 0), CAUSAL, module.init_state(2, device=torch.device("cpu"), dtype=torch.float64))
            module.inner.residual_outputs()


def _layouts(module: Alone) -> Iterator[tuple[Layout, Tensor]]:
    blocks = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 5]])
    if capability(module, "causal"):
        yield CAUSAL, tokens(2, 9)
        yield CAUSAL, tokens(2, 1)
        yield CAUSAL, tokens(2, 70)
        yield Layout(causal=True, cu_seqlens=BORDERS), tokens(1, 9)
    if capability(module, "bidirectional"):
        yield Layout(causal=False), tokens(2, 9)
        yield Layout(causal=False, cu_seqlens=BORDERS), tokens(1, 9)
    if capability(module, "blockwise"):
        yield Layout(causal="block", block=3), tokens(2, 9)
        yield Layout(causal="block", block=blocks), tokens(1, 9)
        yield Layout(causal="block", block=3, cu_seqlens=BORDERS), tokens(1, 9)


def with_many_compressed_keys() -> None:
    """NSA where a mask of all compressed keys would be too large."""
    with mock.patch.object(compress, "MASKED", 0):
        run_everything("nsa")


def never_reached(paths: set[Path], names: list[str], *more: Callable[[], None]) -> list[str]:
    """What of the functions in these files no example of these mixers reaches, as "file:lines"."""
    with lines_reached(paths) as reached:
        for name in names:
            run_everything(name)
        for run in more:
            run()
    missed = {path: lines_of_functions(path) - lines for path, lines in reached.items()}
    return [f"{path.relative_to(ROOT)}:{ranges(lines)}" for path, lines in sorted(missed.items()) if lines]


@pytest.mark.parametrize("name", list_mixers())
def test_examples_reach_every_branch(name: str):
    file = Path(inspect.getsourcefile(get_mixer(name).build))
    missed = never_reached({file}, [name])
    assert not missed, f"no example of {name!r} reaches {', '.join(missed)}"


def test_examples_reach_every_branch_of_the_parts():
    users = [name for name in list_mixers() if f"{parts.__name__}." in str(_parts_of(name))]
    missed = never_reached(set(PARTS.glob("*.py")), users, with_many_compressed_keys)
    assert not missed, f"no example of any mixer reaches {', '.join(missed)}"


def test_many_compressed_keys_are_attended_to_by_blocks(monkeypatch: pytest.MonkeyPatch):
    q, k, v = (tokens(2, t)[..., :12].unflatten(-1, (3 if t == 9 else 1, -1)) for t in (9, 4, 4))
    q, k, v = q[..., :4], k[..., :4], v[..., :4]
    seen = (torch.arange(9) // 2 - 1).expand(2, -1)
    masked = compress.over_all(q, k, v, seen)
    monkeypatch.setattr(compress, "MASKED", 0)
    torch.testing.assert_close(compress.over_all(q, k, v, seen), masked, rtol=1e-9, atol=1e-9)


def _parts_of(name: str) -> set[str]:
    """Where what a mixer's class and its bases are made of comes from."""
    modules = [sys.modules[cls.__module__] for cls in get_mixer(name).build.__mro__]
    own = [module for module in modules if module.__name__.startswith(mixers.__name__)]
    return {str(getattr(value, "__module__", "")) for module in own for value in vars(module).values()}


def test_a_missing_example_is_found(monkeypatch: pytest.MonkeyPatch):
    entry = get_mixer("ttt")
    monkeypatch.setitem(mixers.MIXERS._entries, "ttt", dataclasses.replace(entry, examples=entry.examples[:1]))
    (missed,) = never_reached({Path(inspect.getsourcefile(entry.build))}, ["ttt"])
    assert missed.startswith("backbones/mixers/ttt.py:")


BRANCHES = """
def function(a, b):
    if a:
        a = 0
    if b:
        b = 0
    for i in range(2):
        if i:
            a += 1
    if (
        a
        and b
    ):
        raise ValueError
    if b is None:
        return a
"""


def test_a_branch_that_is_never_passed_over_is_found(tmp_path: Path):
    file = tmp_path / "branches.py"
    file.write_text(BRANCHES)
    names: dict = {}
    exec(compile(BRANCHES, str(file), "exec"), names)
    with lines_reached({file}) as reached:
        names["function"](1, 1)
    missed = lines_of_functions(file) - reached[file]
    assert ranges(missed) == "16, 3 is always true, 5 is always true"
    with lines_reached({file}) as more:
        names["function"](0, 0)
        names["function"](0, None)
    assert not missed - more[file]
