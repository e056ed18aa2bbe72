"""The parts that every recipe trains with."""

import itertools
import signal

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from omnimix.backbones import Backbone, BackboneConfig, no_weight_decay
from omnimix.errors import ConfigError
from omnimix.recipes.audio.recipe import AudioClassification
from omnimix.recipes.common.classification import ClassificationTrainingConfig
from omnimix.recipes.common.media import IGNORED
from omnimix.recipes.common.optimisers import cosine, parameter_groups
from omnimix.recipes.common.training import AverageWeights, LastCheckpoint, WholeFiles, precision
from omnimix.recipes.video.recipe import VideoUnderstanding
from omnimix.recipes.vision.recipe import VisionClassification, VisionTrainingConfig


def test_cosine_rises_then_falls():
    factors = [cosine(step, total=100, warmup=0.1, floor=0.05) for step in range(101)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[10] == 1.0 and factors[100] == pytest.approx(0.05)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert factors[55] == pytest.approx((1 + 0.05) / 2)
    assert cosine(0, total=5, warmup=0.0, floor=0.0) == 1.0


def test_parameters_that_say_so_do_not_decay():
    model = Backbone(BackboneConfig(dim=16, depth=2, pattern=["mamba2", "attention"]))
    frozen = next(model.parameters())
    frozen.requires_grad_(False)
    groups = {group["name"]: group for group in parameter_groups(model, ClassificationTrainingConfig(weight_decay=0.3))}
    assert groups["decay"]["weight_decay"] == 0.3 and groups["no_decay"]["weight_decay"] == 0.0
    names = {id(p): name for name, p in model.named_parameters()}
    spared = {names[id(p)] for _, p in groups["no_decay"]["params"]}
    assert spared == no_weight_decay(model) - {names[id(frozen)]}
    kept = {names[id(p)] for _, p in groups["decay"]["params"]}
    assert kept and all(model.get_parameter(name).ndim > 1 for name in kept)
    assert len(spared) + len(kept) + 1 == len(names)


def test_weights_are_averaged_with_a_decay_that_grows():
    module = nn.Linear(3, 2)
    average = AverageWeights(0.5)
    expected = None
    for step in range(6):
        with torch.no_grad():
            module.weight.normal_()
        average.update(module)
        current = module.weight.detach().double().clone()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = current if expected is None else decay * expected + (1 - decay) * current
    torch.testing.assert_close(average.average[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_precision_is_what_was_named_or_what_pays(monkeypatch):
    monkeypatch.setattr("omnimix.recipes.common.training.native_bf16", lambda: True)
    assert precision("64-true", "cpu", 10) == "64-true"
    assert precision(None, "cuda", 10) == "bf16-mixed"
    assert precision(None, "cpu", 10) == "32-true"
    assert precision(None, "cpu", 10_000_000) == "bf16-mixed"
    monkeypatch.setattr("omnimix.recipes.common.training.native_bf16", lambda: False)
    assert precision(None, "cpu", 10_000_000) == "32-true"


@pytest.mark.parametrize(
    "wrong",
    [{"lr": 0.0}, {"warmup": 1.5}, {"ema": 1.0}, {"label_smoothing": -0.1}, {"mixup": -1.0}, {"weight_decay": -0.1}],
)
def test_impossible_numbers_raise(wrong):
    with pytest.raises(ConfigError, match=f"training.{next(iter(wrong))}"):
        VisionTrainingConfig(**wrong)


@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
@pytest.mark.parametrize("older", [True, False])
def test_a_full_disk_leaves_whole_files_alone(name, older, tmp_path):
    resource = pytest.importorskip("resource")
    before = {name: b"older"} if older else {}
    if older:
        (tmp_path / name).write_bytes(b"older")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(OSError, match="too large") as wrong:
            WholeFiles().save_checkpoint({"state_dict": {"w": torch.zeros(1 << 16)}}, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert wrong.value.filename == str(tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    WholeFiles().save_checkpoint({"a": 1}, tmp_path / name)
    assert torch.load(tmp_path / name, weights_only=True) == {"a": 1}


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler])
def test_the_handler_that_was_there_is_restored(handler, tmp_path):
    """Ctrl-C is ignored in what a shell has started in the background, for example."""
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    before = signal.signal(signal.SIGINT, handler)
    try:
        last = LastCheckpoint(tmp_path)
        last.on_train_start(trainer, pl.LightningModule())
        assert signal.getsignal(signal.SIGINT) == last._ask
        last.on_exception(trainer, pl.LightningModule(), RuntimeError())
        assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_python_does_not_know_gives_way_to_the_system_s(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    last = LastCheckpoint(tmp_path)
    last.on_train_start(trainer, pl.LightningModule())
    assert set(last._handlers.values()) == {signal.SIG_DFL}
    last.on_train_end(trainer, pl.LightningModule())


def classifiers():
    backbone = BackboneConfig(dim=16, depth=1, pattern=("gla",), scan="bidirectional")
    plain = ClassificationTrainingConfig(ema=0.0, label_smoothing=0.0)
    sound = AudioClassification(backbone=backbone, training=plain, sounds=(8000, 0.3, 12))
    return {
        "image": (
            VisionClassification(backbone=backbone, training=VisionTrainingConfig(ema=0.0, label_smoothing=0.0)),
            (1, 8, 8),
        ),
        "video": (VideoUnderstanding(backbone=backbone, training=plain), (1, 16, 32, 32)),
        "audio": (sound, (2400,)),
    }


def gradients_of_steps(module, loader, accumulate, *, max_epochs=1, ckpt_path=None, callbacks=()):
    """What the optimizer is given at each of its steps, none of which changes a weight."""
    steps = []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    optimizer.register_step_post_hook(
        lambda *_: steps.append([p.grad.clone() for p in module.parameters() if p.grad is not None])
    )
    module.configure_optimizers = lambda: optimizer
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        accumulate_grad_batches=accumulate,
        callbacks=[*callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module.eval(), loader, ckpt_path=ckpt_path)
    return steps


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("input_name", ["image", "video", "audio"])
def test_every_sample_of_a_window_of_batches_has_the_same_weight(input_name):
    """Three batches where eight would be accumulated: the last window of every epoch can be such a one."""
    module, shape = classifiers()[input_name]
    sizes = (4, 1, 3)
    batches = [{input_name: torch.randn(n, *shape), "label": torch.arange(n), "problems": []} for n in sizes]
    # In place of samples that cannot be read.
    batches.append({input_name: torch.randn(1, *shape), "label": torch.tensor([IGNORED]), "problems": []})
    together = {name: torch.cat([batch[name] for batch in batches[:3]]) for name in (input_name, "label")}
    steps = gradients_of_steps(module, torch.utils.data.DataLoader(batches, batch_size=None), 8, max_epochs=2)
    loss = nn.functional.cross_entropy(module(together[input_name]), together["label"])
    expected = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])
    assert len(steps) == 2 and not module.training
    for gradients in steps:
        torch.testing.assert_close(gradients, list(expected), rtol=1e-4, atol=1e-6)


class _Batches(list):
    """Batches that say that two of them are done, and are resumed there."""

    first = 0

    def __iter__(self):
        first, self.first = self.first, 0
        return iter(self[first:])

    def state_dict(self):
        return {"first": 2}

    def load_state_dict(self, state):
        self.first = state["first"]


@pytest.mark.filterwarnings("ignore")
def test_windows_weigh_by_their_samples_where_a_run_is_resumed_within_an_epoch(tmp_path):
    module, shape = classifiers()["image"]
    batches = [{"image": torch.randn(n, *shape), "label": torch.arange(n), "problems": []} for n in (2, 2, 5, 1)]
    state = tmp_path / "state.ckpt"

    def save(trainer, *_):
        if trainer.global_step == 1 and not state.exists():
            trainer.save_checkpoint(state)

    saving = pl.callbacks.LambdaCallback(on_train_batch_end=save)
    whole = gradients_of_steps(module, _Batches(batches), 2, callbacks=[saving])
    # A new process has a new module, which has the weights from the state.
    rest = gradients_of_steps(classifiers()["image"][0], _Batches(batches), 2, ckpt_path=state)
    assert len(whole) == 2 and len(rest) == 1
    torch.testing.assert_close(rest[0], whole[1])
