"""Models that 0.1 has saved give the same logits; see tests/data/v01/README.md."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omnimix.backbones import list_mixers
from omnimix.errors import CheckpointError
from omnimix.modalities import load_model, read_details, save_model
from omnimix.modalities.common.weights import FORMAT

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


def test_the_format_is_written_and_a_newer_one_is_refused(tmp_path):
    shutil.copytree(V01 / "models" / "text_gla", tmp_path / "model")
    save_model(load_model(tmp_path / "model"), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    content = json.loads(file.read_text())
    assert content["format"] == FORMAT and content["config"]["objective"]["type"] == "causal"
    assert load_model(tmp_path / "model").config == load_model(V01 / "models" / "text_gla").config
    file.write_text(json.dumps(content | {"format": FORMAT + 1, "omnimix": "9.0"}))
    with pytest.raises(CheckpointError, match=rf"format {FORMAT + 1}, written by omnimix 9.0; .* upgrade omnimix"):
        load_model(tmp_path / "model")


def test_all_mixers_of_0_1_are_there():
    known = {name.removeprefix("text_") for name in MODELS}
    assert len(known & set(list_mixers())) == 17
