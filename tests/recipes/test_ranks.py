"""Two processes train as one with twice the batch, stop together, and go on."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from omnimix.recipes.text import recipe as text_generation
from omnimix.recipes.vision import recipe as vision_classification

# A process that hangs is a failure, and the suite goes on.
LIMIT = 240
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]

VISION = ["--model.dim=16", "--model.depth=1", "--trainer.max_epochs=2"]
TEXT = [
    '--model.prompts=["a"]',
    "--model.dim=16",
    "--model.depth=1",
    "--model.mixer=attention",
    "--model.training.optimizer=adamw",
]
TEXT += ["--data=TextFiles", "--data.vocab_size=260", "--data.length=16", "--data.options.val_fraction=0.2"]
TEXT += ["--trainer.max_steps=24", "--trainer.val_check_interval=12", "--trainer.accumulate_grad_batches=2"]
ALWAYS = ["--threads=1", "--trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    draw = random.Random(0)
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text("".join(draw.choice("abcdef ") for _ in range(draw.randint(20, 200))))
    return folder


class Processes:
    """A command in a group of its own, all of which is killed in the end."""

    def __init__(self, place: Path, *command: str):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        self.process = subprocess.Popen(command, cwd=place, env=environment, start_new_session=True, **pipes)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()  # torchrun's own processes are in other groups, and it ends them
            time.sleep(1)
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.stdout.close()

    def end(self) -> tuple[int, str]:
        """Its status, and what all of it printed."""
        printed, _ = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, printed

    def wait_for(self, file: Path) -> None:
        until = time.monotonic() + LIMIT
        while not file.is_file():
            assert self.process.poll() is None, self.end()[1]
            assert time.monotonic() < until, f"{file} has not appeared"
            time.sleep(0.01)


def weights(place: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(place / "runs" / name / "model.safetensors")


def metrics(place: Path, name: str) -> dict:
    return json.loads((place / "runs" / name / "metrics.json").read_text())


def test_losses_gradients_and_routed_experts(place):
    with Processes(place, *TORCHRUN, str(Path(__file__).with_name("ranks_program.py"))) as processes:
        status, printed = processes.end()
    assert status == 0 and printed.count("all equal") == 1, printed


def test_images_under_torchrun_and_killed_and_resumed(place, monkeypatch):
    words = ["vision", "fit", *VISION, *ALWAYS, "--data.batch_size=16"]
    with Processes(place, *TORCHRUN, "-m", "omnimix", *words, "--name=torchrun") as processes:
        status, printed = processes.end()
    assert status == 0, printed
    for once in ("epoch 1/2", "epoch 2/2", "on held-out images", "picture: "):
        assert printed.count(once) == 1, printed

    killed = ["--name=killed", "--trainer.devices=2", "--trainer.strategy=ddp", "--checkpoint_steps=5"]
    last = place / "runs" / "killed" / "checkpoints" / "last.ckpt"
    with Processes(place, sys.executable, "-m", "omnimix", *words, *killed) as processes:
        processes.wait_for(last)
        os.killpg(processes.process.pid, signal.SIGKILL)
        processes.end()
    assert torch.load(last, weights_only=True)["global_step"] < 88
    assert not (place / "runs" / "killed" / "metrics.json").exists()
    with Processes(place, sys.executable, "-m", "omnimix", "vision", "fit", "--name=killed", "--resume") as processes:
        status, printed = processes.end()
    assert status == 0, printed

    monkeypatch.chdir(place)
    assert vision_classification.fit([*VISION, *ALWAYS, "--data.batch_size=32", "--name=alone"]) == 0
    expected, found = weights(place, "alone"), weights(place, "torchrun")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    resumed = weights(place, "killed")
    assert all(torch.equal(resumed[name], found[name]) for name in found)
    for name in ("torchrun", "killed"):
        assert metrics(place, name)["val_images"] == metrics(place, "alone")["val_images"] == 360 - 1
        assert metrics(place, name)["epochs"] == 2
        assert metrics(place, name)["val/loss"] == pytest.approx(metrics(place, "alone")["val/loss"], abs=1e-4)


def test_text_in_shards_stopped_and_resumed(place, monkeypatch):
    words = [*TEXT, *ALWAYS, f"--data.path={place / 'text'}", f"--data.options.cache={place / 'cache'}"]
    shards = ["--trainer.devices=2", "--trainer.strategy=fsdp2", "--name=shards", "--checkpoint_steps=2"]
    last = place / "runs" / "shards" / "checkpoints" / "last.ckpt"
    command = [sys.executable, "-m", "omnimix", "text", "fit", *words, *shards, "--data.batch_size=3"]
    with Processes(place, *command) as processes:
        processes.wait_for(last)
        os.killpg(processes.process.pid, signal.SIGINT)
        status, printed = processes.end()
    assert status == 130, printed
    assert printed.count("resume with: omnimix text fit --name shards --resume") == 1, printed
    state = torch.load(last, weights_only=True)
    assert 0 < state["global_step"] < 24
    with Processes(place, sys.executable, "-m", "omnimix", "text", "fit", "--name=shards", "--resume") as processes:
        status, printed = processes.end()
    assert status == 0 and printed.count("on held-out text") == 1, printed

    monkeypatch.chdir(place)
    assert text_generation.fit([*words, "--data.batch_size=6", "--name=alone_text"]) == 0
    found, expected = weights(place, "shards"), weights(place, "alone_text")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for name in ("steps", "tokens", "val_tokens", "val_bytes"):
        assert metrics(place, "shards")[name] == metrics(place, "alone_text")[name], name
    assert (place / "runs" / "shards" / "samples.txt").read_text().count("── step 24, from 'a'") == 1
