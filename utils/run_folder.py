"""The folder of a run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from ..errors import CheckpointError, ConfigError
from .files import PART, one_at_a_time


class RunFolder:
    """Everything of one run: `config.yaml`, `checkpoints/`, `logs/`, and at the end the model, numbers and report.

    A run that replaces an older one of its name sets that aside until `commit`; `restore` brings it back.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.last = self.checkpoints / "last.ckpt"
        self.weights = path / "model.safetensors"
        self.metrics = path / "metrics.json"
        self.report = path / "report.png"
        self.samples = path / "samples.txt"
        self.tokenizer = path / "tokenizer.json"
        self._older = path.with_name(f".{path.name}.older")
        self._gone = path.with_name(f".{path.name}.gone")

    @staticmethod
    def named(runs: str, name: str) -> RunFolder:
        if not re.fullmatch(r"[\w.+=-]+", name) or not name.strip("."):
            raise ConfigError(f"name is {name!r}; it must be one word that can name a folder")
        return RunFolder(Path(runs) / name)

    @staticmethod
    def finished(run: str) -> RunFolder:
        """The run in a folder, or of that name under `runs/`.

        Raises:
            CheckpointError: no such run, or it has no model yet.
        """
        for path in (Path(run), Path("runs") / run):
            folder = RunFolder(path)
            if folder.config.is_file():
                if not folder.weights.is_file():
                    raise CheckpointError(f"the run {str(path)!r} has no model yet; resume it with --resume")
                return folder
        raise CheckpointError(f"{run!r} is not a run directory: it has no config.yaml")

    def check(self, *, overwrite: bool, resume: bool) -> None:
        """Raise ConfigError where a new run would meet an old one, or there is none to resume."""
        if not self.path.exists():
            self.recover()
        if resume and not self.path.is_dir():
            raise ConfigError(f"run {str(self.path)!r} does not exist and cannot be resumed; leave --resume out")
        if resume or not self.path.exists() or not any(self.path.iterdir()):
            return
        if not self.config.is_file():
            raise ConfigError(f"{str(self.path)!r} is not empty and not a run directory; choose another --name")
        if not overwrite:
            raise ConfigError(
                f"the run {str(self.path)!r} exists; add --resume to continue it, or --overwrite to start anew"
            )

    def create(self, *, resume: bool) -> None:
        """Make the folder; without `resume` an older run of this name is set aside."""
        if not resume:
            self.recover()
            if self.path.exists():
                self.path.rename(self._older)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        # What a process that was killed while it wrote has left.
        for folder in (self.path, self.checkpoints):
            for left in folder.glob(f".*{PART}"):
                left.unlink(missing_ok=True)

    def commit(self) -> None:
        """Delete the older run of this name."""
        shutil.rmtree(self._gone, ignore_errors=True)
        if self._older.is_dir():
            # A process that is killed here leaves half a run, which must never be restored.
            self._older.rename(self._gone)
            shutil.rmtree(self._gone, ignore_errors=True)

    def discard(self) -> None:
        """Delete what a new run that has failed before its first step has made, so that its name is free again."""
        shutil.rmtree(self.path, ignore_errors=True)

    def restore(self) -> bool:
        """Put the older run of this name back in the place of this one; whether there was one."""
        if not self._older.is_dir():
            return False
        shutil.rmtree(self.path, ignore_errors=True)
        self._older.rename(self.path)
        return True

    def recover(self) -> bool:
        """`restore` where a run that was to replace an older one was killed before `commit`; whether it was.

        It is called before anything of the run is read, by all processes that train together: one of them does it.
        """
        if not self._older.is_dir():
            return False
        with one_at_a_time(self.path):
            return self.restore()
