"""What the data of every medium shares, on a source that needs no files."""

import pickle

import lightning.pytorch as pl
import pytest
import torch

from omnimix.backbones import BackboneConfig
from omnimix.errors import ConfigError, MediaError
from omnimix.recipes.common.classification import Predictions
from omnimix.recipes.common.media import IGNORED, MediaData, Samples, collate
from omnimix.recipes.common.options import LoadingOptions
from omnimix.recipes.vision.recipe import VisionClassification


class Words:
    """A source of words; those of `bad` cannot be read."""

    classes = ("even", "odd")

    def __init__(self, count, bad=()):
        self.count, self.bad = count, set(bad)

    def __len__(self):
        return self.count

    def name(self, index):
        return f"word {index}"

    def label(self, index):
        return index % 2

    def media(self, index):
        if index in self.bad:
            raise MediaError(f"cannot read word {index}")
        return f"{index}".encode()


def load(media, seed):
    drawn = torch.zeros(1) if seed is None else torch.rand(1, generator=torch.Generator().manual_seed(seed))
    return {"word": torch.cat([torch.tensor([float(media)]), drawn])}


class WordData(MediaData):
    def __init__(self, count, bad=(), policy="skip", max_unreadable=0.1):
        super().__init__(loading=LoadingOptions(batch_size=4, seed=3, policy=policy, max_unreadable=max_unreadable))
        self.train_set = Samples(Words(count, bad), load, seed=3)
        self.val_set = Samples(Words(count, bad), load)


def run(data, loader, epoch=0):
    loader.set_epoch(epoch)
    return [data.on_before_batch_transfer(batch, 0) for batch in loader]


def test_samples_depend_on_seed_epoch_and_index_alone():
    samples = pickle.loads(pickle.dumps(Samples(Words(8), load, seed=3)))
    first, again, later = samples[0, 5], samples[0, 5], samples[1, 5]
    assert torch.equal(first["word"], again["word"]) and not torch.equal(first["word"], later["word"])
    assert first["label"] == 1 and first["problem"] is None
    assert torch.equal(Samples(Words(8), load)[0, 5]["word"], Samples(Words(8), load)[1, 5]["word"])


def test_a_sample_that_fills_up_a_batch_has_no_label():
    samples = Samples(Words(8), load)
    assert torch.equal(samples[0, -1 - 5]["word"], samples[0, 5]["word"])
    assert samples[0, -1 - 5]["label"] == samples[0, -1]["label"] == IGNORED


def test_batches_list_what_has_several_shapes():
    def sample(length):
        return {"wave": torch.ones(length), "still": torch.ones(2), "label": length, "problem": None}

    batch = collate([sample(3), sample(5), {"label": 0, "problem": ("name", "why")}])
    assert [len(wave) for wave in batch["wave"]] == [3, 5] and batch["still"].shape == (2, 2)
    assert batch["label"].tolist() == [3, 5] and batch["problems"] == [("name", "why")]


def test_few_unreadable_files_are_skipped_and_logged_once(caplog, capsys):
    data = WordData(200, bad=[3, 50])
    for epoch in range(2):
        labels = torch.cat([batch["label"] for batch in run(data, data.val_dataloader(), epoch)])
        assert len(labels) == 198
    assert data.unreadable == {"word 3": "cannot read word 3", "word 50": "cannot read word 50"}
    assert caplog.text.count("skipped: word 3 ") == 1
    assert capsys.readouterr() == ("", "")


def test_a_batch_of_unreadable_files_counts_nothing_and_leaves_no_rank_waiting():
    # The last held-out batch has one sample, which cannot be read.
    data = WordData(9, bad=[8])
    found = run(data, data.val_dataloader())
    assert [batch["label"].tolist() for batch in found] == [[0, 1, 0, 1], [0, 1, 0, 1], [IGNORED]]
    assert found[-1]["word"].shape == (1, 2) and data.unreadable == {"word 8": "cannot read word 8"}
    module = VisionClassification(backbone=BackboneConfig(dim=8, depth=1, scan="bidirectional"))
    with torch.no_grad():
        module.model.head.classifier.weight.fill_(1.0)
    loss = module.training_step({"image": torch.randn(1, 1, 8, 8), "label": torch.tensor([IGNORED])}, 0)
    loss.backward()
    assert loss == 0 and all(p.grad is not None and not p.grad.any() for p in module.model.parameters())


def test_nothing_that_can_be_read_stops_the_run():
    data = WordData(4, bad=range(4))
    with pytest.raises(MediaError, match="no file can be read, among them 'word 0'"):
        run(data, data.val_dataloader())


def test_many_unreadable_files_stop_the_run():
    data = WordData(200, bad=range(0, 200, 4))
    with pytest.raises(MediaError, match=r"6 of 2\d files read cannot be used, more than data.max_unreadable, 10%"):
        run(data, data.val_dataloader())
    patient = WordData(200, bad=range(0, 200, 4), max_unreadable=0.3)
    assert sum(len(batch["label"]) for batch in run(patient, patient.val_dataloader())) == 150


def test_the_first_unreadable_file_stops_where_told():
    data = WordData(200, bad=[3], policy="raise")
    with pytest.raises(MediaError, match="cannot read word 3 .*skip"):
        run(data, data.val_dataloader())
    with pytest.raises(ConfigError, match=r"data.max_unreadable is 1.5"):
        WordData(4, max_unreadable=1.5)


def test_predictions_keep_samples_of_the_whole_pass_and_leave_out_what_fills_up():
    seen, trainer, module = (
        Predictions(shown=4),
        pl.Trainer(barebones=True),
        VisionClassification(backbone=BackboneConfig(dim=8, depth=1, scan="bidirectional")),
    )
    for start in range(0, 40, 4):
        labels = torch.tensor([0, 0, 1, IGNORED])
        logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [2.0, 0.0]])
        batch = {"image": torch.arange(start, start + 4.0)[:, None], "label": labels}
        seen.on_validation_batch_end(trainer, module, {"logits": logits, "label": labels}, batch, 0)
    assert seen.confusion(2).tolist() == [[10, 10], [0, 10]]
    assert len(seen.wrong) == 4
    kept = [float(sample[0]) for sample, *_ in seen.right]
    assert 4 <= len(kept) < 8 and kept[0] == 0 and kept[-1] >= 30
    shown = seen.gallery(["no", "yes"], lambda image: image.view(1, 1, 1), most=4)
    assert [item.right for item in shown] == [False, False, True, True]
