"""What a run says of its progress where no bar can move."""

import logging
import re
import time

import pytest

from omnimix.__main__ import main
from omnimix.recipes.common.progress import ProgressLines
from omnimix.utils import log
from omnimix.utils.console import duration

TINY = ["--model.dim=16", "--model.depth=1", "--trainer.accelerator=cpu", "--threads=1"]
VISION = ["vision", "fit", "--trainer.limit_train_batches=4", "--trainer.max_epochs=2", *TINY]


@pytest.fixture
def always(monkeypatch):
    """Every line is due."""
    monkeypatch.setattr(ProgressLines, "_due", lambda self, trainer: True)


def test_lines_tell_step_loss_rate_speed_and_time(always, tmp_path, capsys):
    assert main([*VISION, f"--runs={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert len(lines) == 8
    pattern = r"step 3/8  epoch 1/2  loss [\d.]+  lr \S+  [\d,.]+ samples/s  \d+ s left  [\d.]+ GiB"
    assert re.fullmatch(pattern, lines[2])
    assert "  0 s left" in lines[-1] and "validating: batch 1/" in printed
    assert re.search(r"^epoch 2/2 .*val/acc1", printed, re.M)


def test_lines_of_text_count_tokens(always, tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(20):
        (text / f"{i}.txt").write_text(f"text number {i}\n" * 30)
    data = ["--data=TextFiles", f"--data.path={text}", "--data.tokenizer=bytes", "--data.length=32"]
    options = [
        "--trainer.max_steps=3",
        "--trainer.val_check_interval=2",
        "--model.mixer=gla",
        f"--runs={tmp_path / 'runs'}",
    ]
    assert main(["text", "fit", *data, *options, *TINY, f"--data.cache={tmp_path / 'cache'}"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^step 2/3  loss [\d.]+  lr \S+  [\d,.]+ tokens/s  \d+ s left", printed, re.M)
    assert re.search(r"^step 2/3  val/bits_per_byte", printed, re.M)


def test_nothing_is_due_before_ten_seconds(tmp_path, capsys):
    assert main([*VISION, f"--runs={tmp_path}"]) == 0
    assert not re.search("^step ", capsys.readouterr().out, re.M)


def test_what_takes_long_is_recorded_every_ten_seconds(caplog, monkeypatch):
    logger = log.logger_of("omnimix.test")
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO, "omnimix"), log.progress(logger, "reading", 400) as advance:
        for _ in range(4):
            now[0] += 6
            advance(100)
    assert [r.getMessage() for r in caplog.records] == ["reading", "reading: 50 %", "reading: 100 %"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"), (7500, "2 h 05 min"), (-1, "0 s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
