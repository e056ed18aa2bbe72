"""Layouts, contexts, states and configurations in the hands of torch and Lightning."""

from __future__ import annotations

import io

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.utils import _pytree as pytree

import omnimix as om
from omnimix.backbones import BackboneConfig, BlockConfig, Context, Layout, State
from omnimix.backbones.ffn.moe import MoEConfig

PACKED = Layout(cu_seqlens=torch.tensor([0, 2, 5]))


def saved(value: object) -> object:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_states_and_configurations_are_read_as_weights_only():
    config = BackboneConfig(dim=32, depth=2, pattern=("gla", BlockConfig(mixer="mamba2", ffn=MoEConfig(experts=4))))
    state = om.Backbone(config)(torch.randn(2, 5, 32), Layout()).state
    again = saved({"config": config, "state": state})
    assert again["config"] == config
    for (name, tensor), (own, same) in zip(state.named_tensors(), again["state"].named_tensors(), strict=True):
        assert name == own and torch.equal(tensor, same)


@pytest.mark.parametrize(
    "held", [PACKED, Context(PACKED, positions=torch.arange(5)[None]), State({"a": torch.ones(2)})]
)
def test_lightning_moves_them_and_leaves_what_it_does_not_know(held):
    moved = move_data_to_device({"held": held}, torch.device("meta"))["held"]
    assert type(moved) is type(held)
    assert pytree.tree_leaves(moved) and all(t.is_meta for t in pytree.tree_leaves(moved) if isinstance(t, Tensor))
    assert not any(t.is_meta for t in pytree.tree_leaves(held) if isinstance(t, Tensor))
    assert apply_to_collection([held], Tensor, torch.Tensor.double)[0] is held


def test_each_leaf_has_a_path():
    context = Context(PACKED, shared={"image": torch.ones(1, 5, 3)})
    state = State({"blocks.0": State({"mixer": State({"memory": torch.ones(2)})})})
    leaves = pytree.tree_leaves_with_path((context, state))
    paths = [pytree.keystr(path) for path, leaf in leaves if isinstance(leaf, Tensor)]
    assert paths == ["[0].layout.cu_seqlens", "[0].shared['image']", "[1]['blocks.0']['mixer']['memory']"]
