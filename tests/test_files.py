"""Files appear whole or not at all."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from omnimix.modalities.common.weights import save_weights
from omnimix.utils import cache
from omnimix.utils.files import hidden_folder, one_at_a_time, replace_file
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


ORDER = """
import pathlib, sys, time
from omnimix.utils.files import one_at_a_time
target = pathlib.Path(sys.argv[1])
with one_at_a_time(target):
    if not target.exists():
        time.sleep(0.2)
        target.write_text(sys.argv[2])
        print("made", flush=True)
"""


def test_one_process_at_a_time_makes_a_target(tmp_path):
    commands = [[sys.executable, "-c", ORDER, str(tmp_path / "deep" / "target"), str(i)] for i in range(3)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE) for command in commands]
    assert sorted(process.communicate()[0] for process in running) == [b"", b"", b"made\n"]
    assert all(process.returncode == 0 for process in running)


def test_locks_need_no_fcntl_of_ours(tmp_path):
    """On Windows there is no such module; filelock knows what there is."""
    import ast
    import inspect

    from omnimix.utils import files

    found = [node for node in ast.walk(ast.parse(inspect.getsource(files))) if isinstance(node, ast.Import)]
    assert not {"fcntl", "msvcrt"} & {alias.name for node in found for alias in node.names}
    with one_at_a_time(tmp_path / "x"):
        assert (tmp_path / ".x.lock").exists()


def test_the_cache_is_where_the_system_or_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.cache_folder("text") == tmp_path / "omnimix" / "text"
    monkeypatch.delenv("XDG_CACHE_HOME")
    import platformdirs

    assert cache.cache_folder("text") == Path(platformdirs.user_cache_dir("omnimix", appauthor=False)) / "text"


def _raises(*_, **__):
    raise RuntimeError("could not determine the home directory")


@pytest.mark.parametrize("without", [_raises, lambda *_, **__: "~/.cache/omnimix"])
def test_a_cache_without_a_home_is_private(tmp_path, monkeypatch, without):
    import platformdirs

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", without)
    monkeypatch.setattr(cache.tempfile, "tempdir", str(tmp_path))
    cache._without_home.cache_clear()
    folder = cache.cache_folder("native").parent
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0
    cache._without_home.cache_clear()
    assert cache.cache_folder("native").parent == folder
    # One that others may write to is left alone.
    folder.chmod(0o777)
    cache._without_home.cache_clear()
    assert cache.cache_folder("native").parent not in (folder, tmp_path)
    cache._without_home.cache_clear()


HOMELESS = """
import os, pwd, sys
os.environ.pop("HOME", None)
os.environ.pop("XDG_CACHE_HOME", None)
def nobody(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = nobody
from omnimix.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["kernels explain linear_recurrence", "text fit --help"])
def test_commands_run_without_a_home(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HOMELESS, *command.split()],
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "~").exists()
