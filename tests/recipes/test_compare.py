"""`omnimix compare`: runs next to each other."""

import json

import pytest

from omnimix.__main__ import main
from omnimix.errors import CheckpointError, ConfigError
from omnimix.recipes.compare import mcnemar, read, write_predictions
from omnimix.utils.run_folder import RunFolder


def _run(path, said, labels=(0, 0, 1, 1, 1, 0), **metrics):
    folder = RunFolder(path)
    (path / "logs" / "version_0").mkdir(parents=True)
    for file in (folder.config, folder.weights):
        file.write_text("")
    right = sum(a == b for a, b in zip(labels, said, strict=True)) / len(said)
    folder.metrics.write_text(json.dumps({"val/acc1": right, "mixer": "gla", "parameters": 10, **metrics}))
    (path / "logs" / "version_0" / "metrics.csv").write_text(
        "epoch,step,val/acc1,train/loss\n0,1,0.5,\n0,1,,2.0\n1,2,0.6,1.0\n"
    )
    write_predictions(folder, ["cat", "dog"], labels, said)
    return str(path)


def test_what_one_gets_right_and_the_other_does_not(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = _run(tmp_path / "a", (0, 0, 1, 1, 0, 0)), _run(tmp_path / "b", (1, 0, 1, 0, 1, 1))
    assert main(["compare", a, b, "--json", "x.json"]) == 0
    printed = capsys.readouterr().out
    assert "McNemar" in printed and "cat" in printed
    found = json.loads((tmp_path / "x.json").read_text())
    [pair] = found["pairs"]
    assert (pair["both right"], pair["only first"], pair["only second"], pair["neither"]) == (2, 3, 1, 0)
    assert pair["p"] == mcnemar(3, 1) == pytest.approx(0.625)
    assert pair["samples"][0] == {"sample": 0, "label": "cat", "a": "cat", "b": "dog"}
    assert found["classes"][0] == {"class": "cat", "a": 1.0, "b": pytest.approx(1 / 3)}
    assert (tmp_path / "compare.png").read_bytes()[:4] == b"\x89PNG"


def test_other_samples_are_not_tested(tmp_path, capsys):
    a, b = _run(tmp_path / "a", (0, 0, 1, 1, 0, 0)), _run(tmp_path / "b", (0, 1), labels=(0, 1))
    assert main(["compare", a, b, "--picture", "", "--json", str(tmp_path / "x.json")]) == 0
    assert "not validated on the same samples" in capsys.readouterr().out
    assert json.loads((tmp_path / "x.json").read_text())["pairs"] == []


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 10) == pytest.approx(2 / 2**10)
    assert mcnemar(1, 9) == mcnemar(9, 1) == pytest.approx(2 * 11 / 2**10)


def test_two_different_runs(tmp_path):
    a = _run(tmp_path / "a", (0, 0, 1, 1, 0, 0))
    for runs in ([a], [a, a]):
        with pytest.raises(ConfigError, match="two or more different"):
            read(runs)


@pytest.mark.parametrize(
    ("file", "text"), [("predictions.csv", "a,b\n1,2\n"), ("logs/version_0/metrics.csv", "step,val/acc1\n1,x\n")]
)
def test_corrupt_tables_of_a_run_are_named(file, text, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "logs" / "version_0").mkdir(parents=True)
        for each, content in (("config.yaml", "{}"), ("model.safetensors", ""), ("metrics.json", "{}"), (file, text)):
            (tmp_path / name / each).write_text(content)
    with pytest.raises(CheckpointError, match="is corrupt"):
        read([str(tmp_path / "one"), str(tmp_path / "two")])
