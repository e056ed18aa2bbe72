"""Models that 0.1 has saved give the same logits; see tests/data/v01/README.md."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omnimix.backbones import list_mixers
from omnimix.modalities import load_model, read_details

V01 = Path(__file__).parents[1] / "data" / "v01"
MODELS = json.loads((V01 / "expected.json").read_text())


@pytest.fixture(scope="module")
def expected():
    return load_file(V01 / "expected.safetensors")


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_gives_the_same_logits(name, expected):
    model = load_model(V01 / "models" / name)
    assert type(model).__name__ == MODELS[name]["class"]
    assert sum(p.numel() for p in model.parameters()) == MODELS[name]["parameters"]
    assert read_details(V01 / "models" / name) == {"name": name}
    found = model(expected[f"{name}.input"])
    logits = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(logits, expected[f"{name}.logits"], atol=1e-6, rtol=1e-5)


def test_all_mixers_of_0_1_are_there():
    known = {name.removeprefix("text_") for name in MODELS}
    assert len(known & set(list_mixers())) == 17
