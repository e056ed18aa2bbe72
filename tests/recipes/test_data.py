"""Image data: digits, tensors, folders with broken files."""

import numpy as np
import pytest
import torch
from PIL import Image

from omnimix.errors import CheckpointError, ConfigError, MediaError
from omnimix.recipes.common.media import IGNORED
from omnimix.recipes.common.options import LoadingOptions
from omnimix.recipes.vision.data import DigitsData, Jitter, TensorData, stratified_split
from omnimix.recipes.vision.folders import Augment, ImageFolderData
from omnimix.recipes.vision.preprocess import ImagePreprocess


def write_image(path, seed: int, shape=(20, 26)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes of six training and two held-out images; one training file and one held-out file is cut short."""
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                write_image(tmp_path / split / name / f"{i}.jpg", seed=100 * label + i)
    for broken in (tmp_path / "train" / "cat" / "3.jpg", tmp_path / "val" / "dog" / "1.jpg"):
        broken.write_bytes(broken.read_bytes()[:500])
    return tmp_path


def batches(data, loader) -> list:
    return [data.on_before_batch_transfer(batch, 0) for batch in loader]


def test_digits_are_split_by_class_and_always_alike():
    data = DigitsData(loading=LoadingOptions(seed=1))
    data.setup("fit")
    again = DigitsData(loading=LoadingOptions(seed=2))
    again.setup("fit")
    assert torch.equal(data.val_set.images, again.val_set.images)
    assert len(data.train_set) + len(data.val_set) == 1797
    for label in range(10):
        counts = [int((s.labels == label).sum()) for s in (data.train_set, data.val_set)]
        assert abs(counts[1] / sum(counts) - 0.2) < 0.01
    assert (data.classes, data.in_channels, data.image_size) == (10, 1, 8)


def test_stratified_split_is_disjoint_and_complete():
    train, val = stratified_split(torch.arange(60) % 4, 0.25)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(60))


def test_augmentation_follows_from_seed_epoch_and_index():
    data = DigitsData(loading=LoadingOptions(seed=1))
    data.setup("fit")
    keys = [(2, 5), (2, 9), (3, 5)]
    batch = data.train_set.__getitems__(keys)["image"]
    assert torch.equal(batch[1:2], data.train_set.__getitems__([(2, 9)])["image"])
    assert not torch.equal(batch[0], batch[2])
    other = DigitsData(loading=LoadingOptions(seed=2))
    other.setup("fit")
    assert not torch.equal(batch, other.train_set.__getitems__(keys)["image"])
    held = data.val_set.__getitems__([(0, 3), (1, 3)])["image"]
    assert torch.equal(held[0], held[1])


def test_jitter_moves_as_told():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2, 5] = 1.0
    still = torch.full((1, 5), 0.5)
    assert torch.allclose(Jitter(rotate=30.0, shift=0.3, scale=0.2)(image, still), image, atol=1e-5)
    moved = still.clone()
    moved[0, 2] = 1.0  # the whole way to one side
    assert torch.allclose(Jitter(shift=0.25)(image, moved), torch.roll(image, -2, dims=3), atol=1e-5)
    mirrored = still.clone()
    mirrored[0, 4] = 0.2
    assert torch.allclose(Jitter(flip=True)(image, mirrored), image.flip(3), atol=1e-5)
    turned = still.clone()
    turned[0, 0] = 1.0
    assert torch.allclose(Jitter(rotate=90.0)(image, turned), torch.rot90(image, 1, (2, 3)), atol=1e-5)


def test_preprocess_round_trips():
    preprocess = ImagePreprocess(
        classes=("a", "b"), size=16, channels=3, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1), crop=0.8
    )
    assert ImagePreprocess.from_dict(preprocess.to_dict()) == preprocess
    image = torch.rand(3, 33, 21)
    seen = preprocess.load(image)
    assert seen.shape == (3, 16, 16)
    restored = preprocess.restore(preprocess.normalise(image))
    assert torch.allclose(restored, image, atol=1e-6)
    with pytest.raises(CheckpointError, match="prepared"):
        ImagePreprocess.from_dict({"size": 3})


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files_are_skipped_and_named(folder, workers):
    data = ImageFolderData(root=str(folder), size=16, loading=LoadingOptions(batch_size=4, workers=workers))
    data.setup("fit")
    assert data.preprocess.classes == ("cat", "dog")
    train = batches(data, data.train_dataloader())
    val = batches(data, data.val_dataloader())
    assert sum(len(b["label"]) for b in train) == 11
    assert torch.cat([b["label"] for b in val]).tolist() == [0, 0, 1]
    assert all(len(b["image"]) == len(b["label"]) for b in train)
    names = sorted(data.unreadable)
    assert [n.removeprefix(str(folder)) for n in names] == ["/train/cat/3.jpg", "/val/dog/1.jpg"]
    # A resumed run still knows what the first part skipped.
    fresh = ImageFolderData(root=str(folder), size=16)
    fresh.load_state_dict(data.state_dict())
    assert fresh.unreadable == data.unreadable


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files_stop_the_run_where_told(folder, workers):
    data = ImageFolderData(
        root=str(folder), size=16, loading=LoadingOptions(batch_size=4, workers=workers, policy="raise")
    )
    data.setup("fit")
    with pytest.raises(MediaError, match=r"train/cat/3\.jpg") as caught:
        batches(data, data.train_dataloader())
    assert "\n" not in str(caught.value)


def test_a_batch_without_a_readable_file_counts_nothing(folder):
    data = ImageFolderData(root=str(folder), size=16, loading=LoadingOptions(batch_size=1, workers=0))
    data.setup("fit")
    labels = torch.cat([batch["label"] for batch in batches(data, data.val_dataloader())])
    assert labels.tolist().count(IGNORED) == 1 and sorted(labels.tolist())[1:] == [0, 0, 1]
    assert [name.removeprefix(str(folder)) for name in data.unreadable] == ["/val/dog/1.jpg"]


def test_crops_follow_from_seed_epoch_and_index(folder):
    data = ImageFolderData(root=str(folder), size=16, augment=Augment(colour=0.3), loading=LoadingOptions(seed=4))
    data.setup("fit")
    first = data.train_set[(0, 0)]["image"]
    before = torch.get_rng_state()
    torch.manual_seed(99)
    assert torch.equal(first, data.train_set[(0, 0)]["image"])
    assert not torch.equal(first, data.train_set[(1, 0)]["image"])
    torch.set_rng_state(before)
    assert first.shape == (3, 16, 16)


def test_a_class_only_in_val_is_named(folder):
    write_image(folder / "val" / "emu" / "0.png", seed=0)
    with pytest.raises(ConfigError, match="emu"):
        ImageFolderData(root=str(folder)).setup("fit")


def test_a_missing_split_is_named(folder):
    (folder / "train").rename(folder / "elsewhere")
    with pytest.raises(ConfigError, match="'train'"):
        ImageFolderData(root=str(folder)).setup("fit")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_tensors_from_a_file(tmp_path, suffix):
    tensors = {
        "train_images": torch.randint(0, 255, (12, 3, 6, 6), dtype=torch.uint8),
        "train_labels": torch.arange(12) % 3,
        "val_images": torch.randint(0, 255, (5, 3, 6, 6), dtype=torch.uint8),
        "val_labels": torch.arange(5) % 3,
    }
    file = tmp_path / f"data{suffix}"
    if suffix == ".pt":
        torch.save(tensors, file)
    else:
        from safetensors.torch import save_file

        save_file(tensors, file)
    data = TensorData(path=str(file), loading=LoadingOptions(batch_size=4))
    data.setup("fit")
    assert (data.classes, data.in_channels, data.image_size) == (3, 3, 6)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 6, 6) and batch["image"].dtype == torch.float32
    assert torch.cat([b["label"] for b in data.test_dataloader()]).tolist() == tensors["val_labels"].tolist()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"val_images": None}, "val_images"),
        ({"train_images": torch.rand(4, 6, 6)}, "train_images"),
        ({"train_labels": torch.zeros(3, dtype=torch.int64)}, "labels"),
        ({"val_labels": torch.full((2,), 7)}, "7"),
    ],
)
def test_tensors_that_do_not_fit_raise(change, named):
    tensors = {
        "train_images": torch.rand(4, 1, 6, 6),
        "train_labels": torch.tensor([0, 1, 0, 1]),
        "val_images": torch.rand(2, 1, 6, 6),
        "val_labels": torch.tensor([0, 1]),
    } | change
    with pytest.raises(ConfigError, match=named):
        TensorData(tensors={k: v for k, v in tensors.items() if v is not None})


def test_no_data_at_all_raises(tmp_path):
    with pytest.raises(ConfigError, match="path"):
        TensorData()
    with pytest.raises(ConfigError, match="no such file"):
        TensorData(path=str(tmp_path / "none.pt"))
