"""Shards read by ranks with workers: no hang, equal steps, held-out samples once, kill -9 changes nothing."""

import io
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import webdataset
from PIL import Image

from omnimix.errors import MediaError
from omnimix.modalities import ShardSource, load_image
from omnimix.recipes.common.loading import EpochLoader
from omnimix.recipes.common.media import IGNORED, Samples, collate
from omnimix.recipes.video.data import usual_duration
from omnimix.recipes.vision.folders import Augment, LoadImage
from omnimix.recipes.vision.preprocess import ImagePreprocess

SIZES = (1, 7, 3, 13, 5)
WORLD, BATCH, EPOCHS = 2, 3, 2
STEPS = sum(SIZES) // (WORLD * BATCH)
# Three workers are no more than the test wants, on whatever machine.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
# Processes that are forked need not import everything again.
FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    for shard, size in enumerate(SIZES):
        with webdataset.TarWriter(str(folder / f"train-{shard:06d}.tar")) as writer:
            for i in range(size):
                writer.write({"__key__": f"{shard}-{i}", "jpg": f"{shard}-{i}".encode(), "cls": i % 3})
    return sorted(folder.glob("*.tar"))


def load(media, seed):
    return {"key": torch.tensor([int(n) for n in media.split(b"-")]), "seed": torch.tensor(seed or 0)}


def loader_of(shards, rank: int, workers: int, *, shuffle: bool) -> EpochLoader:
    samples = Samples(ShardSource(shards, {".jpg"}), load, seed=7 if shuffle else None)
    return EpochLoader(
        samples, batch_size=BATCH, seed=3, shuffle=shuffle, workers=workers, collate=collate,
        rank=rank, world=WORLD, timeout=60.0,
    )  # fmt: skip


def note(file, step: int, batch) -> None:
    row = [[f"{a}-{b}", seed] for (a, b), seed in zip(batch["key"].tolist(), batch["seed"].tolist(), strict=True)]
    file.write(json.dumps([step, row]) + "\n")
    file.flush()
    os.fsync(file.fileno())


def train(folder: Path, shards, rank: int, workers: int, die: int | None) -> None:
    """A rank's training: it keeps step with the others, saves each second step, and may die before it can save."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    name = folder / f"meet-{die}"
    dist.init_process_group("gloo", init_method=f"file://{name}", rank=rank, world_size=WORLD)
    loader = loader_of(shards, rank, workers, shuffle=True)
    saved = folder / "state.json"
    step, first = 0, 0
    if saved.exists():
        content = json.loads(saved.read_text())
        step, first = content["step"], content["loader"]["epoch"]
        loader.load_state_dict(content["loader"])
    with open(folder / f"rank{rank}.jsonl", "a") as log:
        for epoch in range(first, EPOCHS):
            loader.set_epoch(epoch)
            for batch in loader:
                note(log, step, batch)
                step += 1
                if step == die:
                    end_all(folder, rank)
                total = torch.tensor(len(batch["label"]))
                # A rank that has no batch left would keep the others waiting here for ever.
                dist.all_reduce(total)
                assert total == WORLD * BATCH
                if step % 2 == 0 and rank == 0:
                    (folder / "state.part").write_text(json.dumps({"step": step, "loader": loader.state_dict()}))
                    (folder / "state.part").rename(saved)
                if step % 2 == 0:
                    dist.barrier()
    dist.destroy_process_group()


def end_all(folder: Path, rank: int) -> None:
    """Die once every rank is here: one that dies sooner takes the other's last collective with it."""
    (folder / f"here-{rank}").touch()
    while not all((folder / f"here-{other}").exists() for other in range(WORLD)):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, shards, workers: int, die: int | None = None) -> None:
    processes = [FORK.Process(target=train, args=(folder, shards, rank, workers, die)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    # Not by joining: workers of a rank that was killed hold its end open until they find out.
    patience = time.monotonic() + 60
    while any(process.exitcode is None for process in processes) and time.monotonic() < patience:
        time.sleep(0.01)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0 if die is None else -signal.SIGKILL] * WORLD, "a rank hangs, or failed"


def seen(folder: Path, rank: int) -> list:
    """The batches that count, in order: of a step that was taken again, the last."""
    steps = {}
    for line in (folder / f"rank{rank}.jsonl").read_text().splitlines():
        step, row = json.loads(line)
        steps[step] = row
    assert list(steps) == sorted(steps)
    return list(steps.values())


@pytest.fixture(scope="module")
def whole(tmp_path_factory, shards):
    """What an uninterrupted run without workers reads, by rank."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, shards, 0)
    return [seen(folder, rank) for rank in range(WORLD)]


def test_an_epoch_is_all_samples_in_another_order(whole):
    every = {f"{shard}-{i}" for shard, size in enumerate(SIZES) for i in range(size)}
    assert all(len(rows) == STEPS * EPOCHS for rows in whole)
    epochs = []
    for epoch in range(EPOCHS):
        keys = [row[0] for rows in whole for batch in rows[epoch * STEPS : (epoch + 1) * STEPS] for row in batch]
        assert len(keys) == STEPS * WORLD * BATCH
        # 29 samples in steps of 6: five wait for another epoch, and none is there twice.
        assert set(keys) <= every and len(keys) == len(set(keys))
        epochs.append(keys)
    assert epochs[0] != epochs[1]
    # Augmentation is another one for each epoch and sample.
    seeds = [row[1] for rows in whole for batch in rows for row in batch]
    assert len(set(seeds)) >= len(seeds) - EPOCHS


@pytest.mark.parametrize(("before", "after", "die"), [(0, 0, 3), (2, 2, 7), (3, 3, 5), (3, 0, 3), (0, 2, 7)])
def test_killed_and_resumed_is_as_never_stopped(tmp_path, shards, whole, before, after, die):
    run(tmp_path, shards, before, die=die)
    # The last step was taken, and is not saved.
    assert json.loads((tmp_path / "state.json").read_text())["step"] == die - 1
    run(tmp_path, shards, after)
    assert [seen(tmp_path, rank) for rank in range(WORLD)] == whole


def test_the_same_seed_repeats_with_any_number_of_workers(tmp_path, shards, whole):
    run(tmp_path, shards, 2)
    assert [seen(tmp_path, rank) for rank in range(WORLD)] == whole


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_held_out_samples_come_exactly_once_in_equal_steps(shards, workers):
    counted, steps = [], []
    for rank in range(WORLD):
        loader = loader_of(shards, rank, workers, shuffle=False)
        batches = list(loader)
        assert len(batches) == len(loader)
        steps.append([len(batch["label"]) for batch in batches])
        for batch in batches:
            own = batch["label"] != IGNORED
            assert torch.equal(batch["label"][own], batch["key"][own, 1] % 3)
            counted += [tuple(key) for key in batch["key"][own].tolist()]
    assert steps[0] == steps[1] and sum(steps[0]) == 15
    assert sorted(counted) == [(shard, i) for shard, size in enumerate(SIZES) for i in range(size)]


def test_an_unreadable_member_is_named_with_its_shard(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "x", "jpg": b"no picture", "cls": 0})
    source = ShardSource([tmp_path / "a.tar"], {".jpg"})
    name, reason = Samples(source, lambda media, seed: {"image": load_image(media)})[0, 0]["problem"]
    assert name == source.name(0) == f"{tmp_path}/a.tar/x.jpg" and reason.startswith(
        f"cannot read the image {name!r}: "
    )


def test_videos_none_of_which_can_be_read_are_named_with_their_shard(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "x", "mp4": b"no video", "cls": 0})
    with pytest.raises(MediaError, match=r"cannot read '.*/a\.tar/x\.mp4': "):
        usual_duration(ShardSource([tmp_path / "a.tar"], {".mp4"}))


def test_workers_that_are_not_forked_read_the_same(tmp_path):
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for i in range(6):
            picture = io.BytesIO()
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(picture, "png")
            writer.write({"__key__": f"{i}", "png": picture.getvalue(), "cls": i % 2})
    preprocess = ImagePreprocess(classes=("a", "b"), size=8, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)
    samples = Samples(ShardSource([tmp_path / "a.tar"], {".png"}), LoadImage(preprocess, Augment()), seed=1)
    options = {"batch_size": 3, "seed": 2, "shuffle": True, "collate": collate}
    here = list(EpochLoader(samples, **options))
    there = list(EpochLoader(samples, **options, workers=1, context="forkserver", timeout=60.0))
    assert len(here) == len(there) == 2
    assert all(torch.equal(a[name], b[name]) for a, b in zip(here, there, strict=True) for name in ("image", "label"))
