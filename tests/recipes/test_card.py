"""The model card of a run."""

import pytest
import yaml

from omnimix.recipes.common.card import card

METRICS = {
    "mixer": "gla,attention+gla",
    "parameters": 12_345,
    "configuration": "mine",
    "seed": 0,
    "precision": "32-true",
    "train_seconds": 12.3,
    "val/acc1": 0.98765,
    "val/loss": 0.1,
    "val/bits_per_byte": 1.5,
    "val/perplexity": 9.0,
}


@pytest.mark.parametrize("task", ["vision", "video", "audio", "text"])
def test_a_card_is_read_by_hubs(task):
    text = card(task, "run", METRICS, "MyData", ("a|b", "c"))
    head = yaml.safe_load(text.split("---")[1])
    assert head["library_name"] == "omnimix" and head["tags"] == ["omnimix", "gla", "attention"]
    assert ("| accuracy | 0.9877 |" in text) == (task != "text")
    assert "12,345" in text and "Classes: a\\|b, c." in text
    hub = pytest.importorskip("huggingface_hub")
    found = hub.ModelCard(text)
    assert found.data.pipeline_tag.endswith("generation" if task == "text" else "classification")
    assert found.data.library_name == "omnimix"
    [result] = found.data.eval_results
    assert (result.dataset_name, result.metric_value) == ("MyData", 9.0 if task == "text" else 0.98765)


def test_many_classes_are_cut():
    assert "and 20 more" in card("vision", "run", METRICS, "MyData", tuple(map(str, range(120))))
