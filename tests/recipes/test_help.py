"""Help one can read, and options by other names."""

import pytest

from omnimix.__main__ import main
from omnimix.errors import ConfigError
from omnimix.recipes import api
from omnimix.recipes.common.help import MEANT, groups, text


@pytest.mark.parametrize("task", list(api.TASKS))
def test_help_is_short_and_says_what_there_is(task, capsys):
    with pytest.raises(SystemExit) as stop:
        main([task, "fit", "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed == text(task) and printed.count("\n") < 60
    assert max(map(len, printed.splitlines())) <= 130
    with pytest.raises(SystemExit):
        main([task, "fit", "--help", "all"])
    whole = capsys.readouterr().out
    assert whole.count("\n") > 150 and "--trainer.enable_checkpointing" in whole
    # Every option of the short help is one.
    known = {place for place in api._places(task).values()}
    for rows in groups(task).values():
        for option in (row[0].split()[0] for row in rows):
            plain = ".".join(option.split(".")[:2])
            found = option in whole or option in known or plain in known or plain in whole
            assert found, option


WRONG = {
    "--model.width=64": "--model.dim",
    "--hidden_size=64": "--model.dim",
    "--num_layers=2": "--model.depth",
    "--lr=1e-3": "--model.training.lr",
    "--learning-rate=1e-3": "--model.training.lr",
    "--num-heads=4": "--model.mixers.NAME.heads",
    "--epochs=3": "--trainer.max_epochs",
    "--batch-size=8": "--data.batch_size",
    "--gpus=1": "--trainer.devices",
    "--img_size=32": "--data.size",
    "--output_dir=x": "--runs",
    "--seed=1": "--seed_everything",
    "--dropout=0.1": "--model.drop_path",
    "--pretrained=x": "--init",
}


@pytest.mark.parametrize(("typed", "meant"), WRONG.items())
def test_the_most_likely_wrong_options(typed, meant, capsys, tmp_path):
    assert main(["vision", "fit", f"--runs={tmp_path}", typed]) == 2
    said = capsys.readouterr().err
    assert f"did you mean '{meant}'?" in said and said.count("\n") == 1


def test_the_same_in_python(tmp_path):
    with pytest.raises(ConfigError, match="unknown option 'epochs'; did you mean 'max_epochs'"):
        api.fit("vision", runs=tmp_path, epochs=3)
    with pytest.raises(ConfigError, match="did you mean 'lr'"):
        api.fit("vision", runs=tmp_path, learning_rate=3)


def test_what_is_meant_exists():
    places = {place for task in api.TASKS for place in api._places(task).values()}
    own = {"--runs", "--name", "--seed_everything", "--data", "--model.mixers.NAME.heads"}
    assert set(MEANT.values()) - own <= places
