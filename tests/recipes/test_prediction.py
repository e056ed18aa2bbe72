"""What the commands that name the classes of files share."""

import csv
import json
import os
import shutil

import pytest

from omnimix.__main__ import main
from omnimix.errors import ConfigError, OutputError
from omnimix.recipes.common.prediction import check_counts
from omnimix.utils.options import output_file


def test_numbers_are_checked():
    check_counts(top=1, every=1)
    for wrong in ({"top": 0, "every": 1}, {"top": 1, "every": 0}):
        with pytest.raises(ConfigError, match="is 0; it must be at least 1"):
            check_counts(**wrong)


def test_what_is_written_at_the_end_has_its_folder_before(tmp_path):
    assert output_file(str(tmp_path / "new" / "deeper" / "p.png")).endswith("p.png")
    assert (tmp_path / "new" / "deeper").is_dir() and not any((tmp_path / "new" / "deeper").iterdir())
    (tmp_path / "file").touch()
    wrong = [(tmp_path, "where the result is to go, is a folder"), (tmp_path / "file" / "p.png", "cannot be written")]
    for name, said in [*wrong, *([("/proc/rows.json", "cannot be written")] if os.path.isdir("/proc") else [])]:
        with pytest.raises(OutputError, match=f"{said}.*; name "):
            output_file(str(name))
    assert output_file("-") == "-"


@pytest.mark.parametrize("kind", ["vision", "video", "audio"])
def test_commands_write_tables_where_they_are_told(kind, saved, tmp_path, capsys):
    model = {"vision": "image"}.get(kind, kind)
    files = {"vision": ["images"], "video": ["clip.mp4"], "audio": ["one.wav", "two.wav"]}[kind]
    run = tmp_path / "run"
    shutil.copytree(saved / model, run)
    (run / "config.yaml").write_text("{}")
    words = [kind, "predict", "--run", str(run), *(str(saved / file) for file in files), "--top", "2"]
    table, rows = tmp_path / "deep" / "t.csv", tmp_path / "rows.json"
    assert main([*words, "--csv", str(table), "--json", str(rows), "--batch-size=1", "--device", "cpu"]) == 0
    assert "predictions" in capsys.readouterr().out
    found = list(csv.DictReader(table.open(newline="")))
    wanted = json.loads(rows.read_text())
    assert [row["class"] for row in found] == [row["class"] for row in wanted] and len(found) >= 2
    assert main([*words, "--csv", "-"]) == 0
    printed = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["class"] for row in printed] == [row["class"] for row in wanted]
    assert main([*words, "--csv", "-", "--json", "-"]) == 2
    assert main([*words, "--device", "nix"]) == 2 and main([*words, "--batch-size", "0"]) == 2
    said = capsys.readouterr().err
    assert "only one of them" in said and "device is 'nix'" in said and "batch_size is 0" in said
    assert main([*words, "--csv", str(tmp_path)]) == 2
    assert "is a folder; name a file in it" in capsys.readouterr().err
