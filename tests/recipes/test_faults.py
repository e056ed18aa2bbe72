"""What a newcomer meets on the command line: old names, options that would have no effect."""

import json
import warnings

import pytest
import yaml

from omnimix.__main__ import main
from omnimix.recipes.common.parser import of_a_package
from omnimix.utils.log import printed

SMALL = ["--model.dim=16", "--model.depth=1", "--trainer.max_epochs=1", "--data.batch_size=512"]


def test_the_trainers_own_folder_is_refused(tmp_path, capsys):
    words = ["vision", "fit", f"--runs={tmp_path}", f"--trainer.default_root_dir={tmp_path / 'x'}", *SMALL]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "trainer.default_root_dir" in said and "--runs" in said and said.count("\n") == 1


def test_warnings_of_commands_are_one_line(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        shown = warnings.formatwarning("a\n b", FutureWarning, "file.py", 3, "source")
        with printed():
            assert warnings.formatwarning("a\n b", FutureWarning, "file.py", 3, "source") == "omnimix: warning: a b\n"
        assert warnings.formatwarning("a\n b", FutureWarning, "file.py", 3, "source") == shown
    assert "file.py" in shown


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert main(["vision", "fit", f"--runs={tmp_path}", "--dry-run", *SMALL]) == 0
    said = capsys.readouterr().out
    assert "parameters" in said and "steps" in said and str(tmp_path) in said
    assert not list(tmp_path.iterdir())


def test_a_run_has_a_card_predictions_and_rates(tmp_path):
    assert main(["vision", "fit", f"--runs={tmp_path}", "--name=one", "--trainer.log_every_n_steps=1", *SMALL]) == 0
    folder = tmp_path / "one"
    head = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert head["library_name"] == "omnimix" and head["pipeline_tag"] == "image-classification"
    assert head["metrics"] == ["accuracy"]
    rows = (folder / "predictions.csv").read_text().splitlines()
    assert rows[0] == "sample,label,prediction"
    assert len(rows) - 1 == json.loads((folder / "metrics.json").read_text())["val_images"]
    assert "lr" in (folder / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    hub = pytest.importorskip("huggingface_hub")
    found = hub.ModelCard.load(folder / "README.md")
    assert found.data.library_name == "omnimix" and found.data.eval_results[0].metric_type == "accuracy"


def test_a_logger_without_its_package_says_what_to_install():
    message = "class_path 'lightning.pytorch.loggers.WandbLogger': Requirement 'wandb>=0.12.10' not met."
    assert of_a_package(message) == "WandbLogger needs a package that is missing: pip install 'wandb>=0.12.10'"
    assert of_a_package("something else") == "something else"
