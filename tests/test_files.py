"""Files appear whole or not at all."""

import errno
import subprocess
import sys

import pytest
from torch import nn

from omnimix.modalities.common.weights import save_weights
from omnimix.utils.files import hidden_folder, replace_file
from omnimix.utils.run_folder import RunFolder


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    file = tmp_path / "model.safetensors"
    save_weights(nn.Linear(2, 2), file)
    before, (soft, hard) = file.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="too large") as wrong:
            save_weights(nn.Linear(200, 200), file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert wrong.value.errno == errno.EFBIG and wrong.value.filename == str(file)
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]


def test_errors_of_the_writer_are_its_own(tmp_path):
    def write(path):
        raise ValueError("no numbers")

    with pytest.raises(ValueError, match="no numbers"):
        replace_file(tmp_path / "x", write)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_file_and_not_the_one_beside(tmp_path):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    def moved(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path), None, str(path))

    for write in (full, moved):
        with pytest.raises(OSError, match="No space left") as wrong:
            replace_file(tmp_path / "predictions.json", write)
        assert (wrong.value.filename2 or wrong.value.filename) == str(tmp_path / "predictions.json")

    def another(path):
        (tmp_path / "none").read_bytes()

    with pytest.raises(FileNotFoundError) as wrong:
        replace_file(tmp_path / "x", another)
    assert wrong.value.filename == str(tmp_path / "none")


KILLED = """
import os, pathlib, sys
from omnimix.utils.files import hidden_folder
target = pathlib.Path(sys.argv[1])
with hidden_folder(target) as folder:
    (folder / "half").touch()
    if target.exists():
        target.rename(folder.with_name("replaced"))
    print("ready", flush=True)
    if sys.argv[2] == "die":
        os.kill(os.getpid(), 9)
    sys.stdin.read()
"""


def hidden(place) -> list:
    return [path for path in place.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("there", [True, False])
def test_what_a_killed_process_has_left_is_removed(there, tmp_path):
    pytest.importorskip("fcntl")
    target = tmp_path / "shards [1]"
    if there:
        target.mkdir()
        (target / "old").touch()
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), "die"], capture_output=True)
    assert done.returncode == -9 and len(hidden(tmp_path)) == 1 and not target.exists()
    with hidden_folder(target) as folder:
        assert len(hidden(tmp_path)) == 1 and not list(folder.iterdir())
        # What had given way is there again.
        assert (target / "old").exists() == there
    assert not hidden(tmp_path)


def test_what_a_living_process_makes_stays(tmp_path):
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", KILLED, str(tmp_path / "shards"), "live"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as living:
        assert living.stdout.readline() == b"ready\n"
        with hidden_folder(tmp_path / "shards"):
            assert len(hidden(tmp_path)) == 2
        assert len(hidden(tmp_path)) == 1
        living.stdin.close()
    assert not hidden(tmp_path)


def test_a_resumed_run_starts_without_what_a_killed_one_was_writing(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.create(resume=False)
    for folder in (run.path, run.checkpoints):
        (folder / ".last.ckpt.x1.part").touch()
    run.last.touch()
    run.create(resume=True)
    assert [path for path in run.path.rglob("*") if path.is_file()] == [run.last]
