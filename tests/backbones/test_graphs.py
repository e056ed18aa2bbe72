"""Graphs of torch.export, torch.jit.trace and torch.compile: one serves every batch and length, and may be saved."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ShapesCollection, export

import omnimix as om
from omnimix.backbones import Layout, State, list_mixers
from omnimix.backbones.mixers import get_mixer
from omnimix.cli.check_kernels import error

CAUSAL = Layout(causal=True)
pytestmark = pytest.mark.usefixtures("without_shape_checks")


class Whole(nn.Module):
    """A backbone under a causal layout."""

    def __init__(self, mixer: str):
        super().__init__()
        torch.manual_seed(0)
        options = {mixer: get_mixer(mixer).examples[0]}
        # Layers of RWKV-7 read what the first one shares.
        depth = 2 if mixer == "rwkv7" else 1
        self.net = om.Backbone(om.BackboneConfig(dim=48, depth=depth, pattern=[mixer], mixers=options)).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x, CAUSAL).y


class Step(Whole):
    """A decoding step."""

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        out = self.net(x, CAUSAL, state)
        return out.y, out.state


def exported(module: nn.Module, given: tuple, shapes: tuple | ShapesCollection) -> nn.Module:
    """What `module` is after export, saving and loading."""
    with torch.no_grad():
        program = export(module, given, dynamic_shapes=shapes, strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


# Filters as long as the sequence keep one step less, which must not be a single one.
SHORTEST = {"s4d": 3}


@pytest.mark.parametrize("mixer", list_mixers())
def test_batch_and_length_stay_dynamic(mixer: str):
    module = Whole(mixer)
    batch, length = Dim("batch", min=2, max=64), Dim("length", min=SHORTEST.get(mixer, 2), max=256)
    again = exported(module, (torch.randn(3, 20, 48),), ({0: batch, 1: length},))
    with torch.no_grad():
        for shape in ((5, 33, 48), (2, 90, 48), (2, 3, 48)):
            x = torch.randn(shape)
            assert error(again(x), module(x)) < 1e-5, shape


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mamba", "window"])
def test_a_decoding_step_is_exported(mixer: str):
    module, batch = Step(mixer), Dim("batch", min=2, max=64)
    with torch.no_grad():
        states = [module.net(torch.randn(b, 9, 48), CAUSAL).state for b in (3, 5)]
        given, shapes = (torch.randn(3, 1, 48), states[0]), ShapesCollection()
        for tensor in (given[0], *states[0].tensors()):
            shapes[tensor] = {0: batch}
        again = exported(module, given, shapes)
        x = torch.randn(5, 1, 48)
        (y, after), (z, wanted) = again(x, states[1]), module(x, states[1])
    assert error(y, z) < 1e-5
    for name, tensor in wanted.named_tensors():
        torch.testing.assert_close(dict(after.named_tensors())[name], tensor, msg=name)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("mixer", list_mixers())
def test_a_mixer_is_traced(mixer: str):
    module, x = Whole(mixer), torch.randn(3, 20, 48)
    with torch.no_grad():
        traced = torch.jit.trace(module, (x,), check_trace=False)
        assert error(traced(x), module(x)) < 1e-5
        # The number of blocks from which nsa chooses is a number to jit.trace.
        if mixer != "nsa":
            other = torch.randn(5, 33, 48)
            assert error(traced(other), module(other)) < 1e-5


@pytest.mark.parametrize("mixer", list_mixers())
def test_onnx_finds_no_op_of_ours(mixer: str, monkeypatch):
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    module, x = Whole(mixer), torch.randn(2, 4, 48)
    with torch.no_grad():
        program = export(module, (x,), strict=False)
        assert {str(n.target) for n in program.graph.nodes if "omnimix" in str(n.target)} == set()
        assert error(program.module()(x), module(x)) < 1e-5


@pytest.mark.parametrize("mixer", ["attention", "gla", "mamba", "gated_deltanet"])
def test_onnx_computes_the_same(mixer: str):
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    module, x = Whole(mixer), torch.randn(2, 4, 48)
    with torch.no_grad():
        program = torch.onnx.export(module, (x,), dynamo=True, verbose=False).model_proto
        wanted = module(x)
    (found,) = ReferenceEvaluator(program).run(None, {program.graph.input[0].name: x.numpy()})
    assert error(torch.from_numpy(found), wanted) < 1e-5
