"""Options that follow from the data: the mechanism, and the rule of `vision_folder`."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from omnimix.__main__ import main
from omnimix.modalities.data.sources import IMAGE_SUFFIXES, find_splits
from omnimix.recipes.common.rules import GIVEN, Rule, decide
from omnimix.recipes.common.summary import summarise
from omnimix.recipes.common.watch import WatchLearning
from omnimix.recipes.vision.folders import ImageFolderData
from omnimix.recipes.vision.rules import VISION_RULE, ImageFacts, image_facts

NOMINAL = ImageFacts()


def decided(facts=NOMINAL, **given):
    names = {option.replace(".", "_"): option for option in VISION_RULE.choices}
    values = dict.fromkeys(VISION_RULE.choices) | {names[name]: value for name, value in given.items()}
    return {d.option: d for d in decide(VISION_RULE, facts, values)}


def value(option, facts=NOMINAL, **given):
    return decided(facts, **given)[option].value


@pytest.fixture
def folder(tmp_path):
    """Two classes of coloured images, 20 x 30, 12 to train on; one of them is a validation image too."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cats", "dogs"):
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(place / f"{i}.png")
    data = tmp_path / "data"
    shutil.copy(data / "train" / "cats" / "0.png", data / "val" / "cats" / "1.png")
    return data


def fit(folder, name, *words):
    # Nothing is trained; what counts is what is stored.
    limits = ["--trainer.limit_train_batches=0", "--trainer.limit_val_batches=0", "--trainer.max_epochs=1"]
    runs = folder.parent / "runs"
    command = ["vision", "fit", "--config", "vision_folder", "--data.root", str(folder), "--runs", str(runs)]
    assert main([*command, "--name", name, *limits, *words]) == 0
    return yaml.safe_load((runs / name / "config.yaml").read_text())


def stored(config, option):
    section, *path = option.split(".")
    found = config[section]["init_args"] if section == "data" else config[section]
    for key in path:
        found = found[key]
    return found


def test_later_choices_follow_from_earlier_ones_and_from_what_is_given():
    rule = Rule(
        facts=lambda data, options: None,
        choices={"a": lambda f, v: (f, "one"), "b": lambda f, v: (2 * v["a"], "twice"), "c": lambda f, v: (0, "")},
    )
    assert [(d.option, d.value) for d in decide(rule, 3, {"a": None, "b": None})] == [("a", 3), ("b", 6)]
    given = decide(rule, 3, {"a": 5, "b": None})
    assert [(d.value, d.reason) for d in given] == [(5, GIVEN), (10, "twice")]


@pytest.mark.parametrize("option", VISION_RULE.choices)
def test_what_is_given_stays_and_the_rest_is_still_chosen(option):
    other = {int: 2, float: 0.125, str: "patch", dict: {}}[type(value(option))]
    found = decided(**{option.replace(".", "_"): other})
    assert found.pop(option).value == other
    assert len(found) == len(VISION_RULE.choices) - 1
    assert all(d.value is not None and d.reason and d.reason != GIVEN for d in found.values())


def test_choices_move_one_way_with_the_data():
    sizes = [10, 100, 1_000, 10_000, 100_000, 1_000_000]
    of = {n: decided(ImageFacts(samples=n)) for n in sizes}
    for option in ("model.backbone.dim", "model.backbone.depth", "model.backbone.drop_path", "data.loading.batch_size"):
        values = [of[n][option].value for n in sizes]
        assert values == sorted(values) and values[0] < values[-1], option
    large = [value("data.size", ImageFacts(samples=n, side=500)) for n in sizes]
    assert large == sorted(large) and large[0] < large[-1]
    epochs = [of[n]["trainer.max_epochs"].value for n in sizes]
    assert epochs == sorted(epochs, reverse=True) and epochs[0] > epochs[-1] >= 3
    fast = [value("trainer.max_epochs", ImageFacts(samples=n, accelerator=True)) for n in sizes]
    assert all(more >= few for more, few in zip(fast, epochs, strict=True)) and fast[-2] > epochs[-2]
    # Longer runs average over more steps, and wider models learn at a lower rate.
    assert value("model.training.ema", trainer_max_epochs=300) > value("model.training.ema", trainer_max_epochs=10)
    assert value("model.training.lr", model_backbone_dim=512) < value("model.training.lr", model_backbone_dim=64)
    assert value("model.training.lr", data_loading_batch_size=128) > value(
        "model.training.lr", data_loading_batch_size=8
    )
    assert (
        value("model.training.mixup", trainer_max_epochs=5) == 0 < value("model.training.mixup", trainer_max_epochs=300)
    )


@pytest.mark.parametrize("side", [1, 8, 20, 28, 32, 64, 96, 100, 128, 600, 4000])
def test_sizes_fit_together(side):
    found = decided(ImageFacts(side=side, samples=100_000))
    size, patch = found["data.size"].value, found["model.patch"].value
    assert 8 <= size <= 128 and size >= min(side, 128) and patch & (patch - 1) == 0
    assert -(-size // patch) <= 15 and (size < 14 or size // patch >= 7)


def test_facts_of_a_folder(folder):
    facts = image_facts(ImageFolderData, {"root": str(folder)})
    assert (facts.classes, facts.samples, facts.side, facts.grey) == (2, 12, 20, False)
    assert facts.summary.samples == {"train": 12, "val": 4}
    for file in folder.rglob("*.png"):
        with Image.open(file) as image:
            image.convert("L").convert("RGB").save(file)
    assert image_facts(ImageFolderData, {"root": str(folder)}).grey
    assert image_facts(ImageFolderData, {}).summary is None


def test_warnings_of_the_summary(folder):
    summary = summarise(find_splits(folder, IMAGE_SUFFIXES))
    [pair] = summary.duplicates
    assert pair[0].endswith("train/cats/0.png") and pair[1].endswith("val/cats/1.png")
    assert any("1 held-out samples are training samples too" in line for line in summary.lines())
    uneven = dataclasses.replace(summary, largest=("dogs", 600), empty=("birds",), duplicates=())
    assert ["birds" in uneven.warnings()[0], "600" in uneven.warnings()[1]] == [True, True]
    assert not dataclasses.replace(summary, duplicates=()).warnings()


def test_values_are_printed_and_stored_and_can_be_set(folder, tmp_path, capsys):
    config = fit(folder, "auto")
    out = capsys.readouterr().out
    assert "2 classes, samples: 12 train, 4 val" in out and "model.training.lr" in out and "as given" in out
    chosen = decided(image_facts(ImageFolderData, {"root": str(folder)}), trainer_max_epochs=1)
    for option, decision in chosen.items():
        assert stored(config, option) == decision.value, option
    # On the command line by short and by long names, in a file, and by null again.
    (tmp_path / "mine.yaml").write_text(
        "model: {patch: 4, training: {lr: 0.5}}\ndata: {class_path: ImageFolderData, init_args: {size: 24}}\n"
    )
    words = ["--model.dim=8", "--data.batch_size=3", "--model.training.ema", "0.5", "--model.training.lr=null"]
    words += ["--data.augment.flip", "false"]
    config = fit(folder, "set", "--config", str(tmp_path / "mine.yaml"), *words)
    wanted = {"model.patch": 4, "data.size": 24, "model.backbone.dim": 8, "data.loading.batch_size": 3}
    for option, wished in (wanted | {"model.training.ema": 0.5}).items():
        assert stored(config, option) == wished, option
    augment = stored(config, "data.augment")
    assert augment["flip"] is False and augment["scale"] == value("data.augment")["scale"]
    assert stored(config, "model.training.lr") == value(
        "model.training.lr", model_backbone_dim=8, data_loading_batch_size=3
    )


def test_a_resumed_run_keeps_its_values(folder, capsys):
    before = fit(folder, "again")
    # More images than before would be more than one batch.
    for i in range(100):
        shutil.copy(folder / "train" / "cats" / "0.png", folder / "train" / "cats" / f"more{i}.png")
    runs = folder.parent / "runs"
    capsys.readouterr()
    assert main(["vision", "fit", "--name", "again", "--runs", str(runs), "--resume"]) == 0
    assert "chosen" not in capsys.readouterr().out
    after = yaml.safe_load((runs / "again" / "config.yaml").read_text())
    assert all(stored(before, option) == stored(after, option) for option in VISION_RULE.choices)


def test_a_folder_alone_is_enough(folder):
    runs = folder.parent / "runs"
    limits = ["--trainer.limit_train_batches=0", "--trainer.limit_val_batches=0", "--trainer.max_epochs=1"]
    assert main(["vision", "fit", "--data.root", str(folder), "--name", "short", "--runs", str(runs), *limits]) == 0
    config = yaml.safe_load((runs / "short" / "config.yaml").read_text())
    assert config["data"]["class_path"].endswith("ImageFolderData") and config["model"]["stem"] == "conv"


def watched(losses, accuracy=0.9, epochs=10):
    """What is warned of over validations with these losses."""
    watch = WatchLearning(classes=4)
    trainer = SimpleNamespace(
        state=SimpleNamespace(fn="fit"), sanity_checking=False, max_epochs=epochs, is_global_zero=True
    )
    for epoch, loss in enumerate(losses):
        trainer.current_epoch = epoch
        trainer.callback_metrics = {"val/loss": torch.tensor(loss), "val/acc1": torch.tensor(accuracy)}
        watch.on_validation_end(trainer, None)
    return watch


def test_a_training_that_learns_nothing_is_warned_of_once(caplog):
    assert watched([3.0, 3.1, 3.2, 3.1, 3.3, 3.4]).said == ["loss"]
    assert len(caplog.records) == 1 and "has not fallen" in caplog.text
    assert watched([3.0, 2.9, 2.8, 2.8, 2.7, 2.6], accuracy=0.25).said == ["accuracy"]
    assert "at most 25.0%, and guessing among 4 classes gives 25.0%" in caplog.text
    assert not watched([3.0, 3.1, 3.2, 3.1]).said and not watched([3.0, 2.9, 3.0, 3.0, 3.0, 3.0]).said
    assert not watched([3.0] * 6, epochs=100).said
    state = watched([3.0, 3.1, 3.2]).state_dict()
    again = WatchLearning(classes=4)
    again.load_state_dict(state)
    assert again.losses == [3.0, pytest.approx(3.1), pytest.approx(3.2)]
