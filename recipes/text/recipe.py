"""Language models: `omnimix text fit` and `validate`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from ...backbones import BackboneConfig, LanguageModel, LanguageModelConfig
from ...backbones.config import ObjectiveConfig
from ...backbones.registry import entry_of
from ...backbones.serialization import to_dict
from ...errors import ConfigError
from ...modalities import save_model
from ...modalities.common.classifier import pattern_name
from ...utils.console import emit, say
from ...utils.renamed import renamed_arguments
from ..common.card import write_card
from ..common.cli import NOTHING, RecipeCLI
from ..common.commands import evaluate, run_fit
from ..common.history import StepHistory
from ..common.loading import mix
from ..common.migration import RENAMED_ARGUMENTS
from ..common.optimisers import optimise, planned_steps
from ..common.ranks import from_all_ranks, summed
from ..common.report import Row, curves, text, write_metrics, write_report
from ..common.strategies import whole_model
from ..common.training import AverageWeights, EvenSteps, TrainingConfig, parts
from .data import TextData
from .lengths import cut, length_at, scored
from .samples import Samples

RECIPE = "text_generation"
# Seeds the masks that a diffusion objective samples over the validation text.
VALIDATION_SEED = 0x7E57


@dataclass(frozen=True, kw_only=True)
class TextTrainingConfig(TrainingConfig):
    """How the weights of a language model are found; see `TrainingConfig` for the rest.

    Args:
        length_warmup: the part of all steps over which the training sequences grow, by doubling, from 32 tokens to
            their full length (arXiv 2108.06084); 0 is full length from the start.
    """

    optimizer: Literal["adamw", "muon"] = "muon"
    lr: float = 2e-3
    weight_decay: float = 0.1
    length_warmup: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        parts(self, "length_warmup")


_BACKBONE = BackboneConfig(dim=256, depth=6, pattern=("gated_deltanet", "gated_deltanet", "attention"))


class TextGeneration(EvenSteps):
    """A language model and how it is trained.

    Each scored token of a step weighs the same, whichever process has it and whichever batch it is in with
    `trainer.accumulate_grad_batches`.

    Args:
        backbone: the configuration of the blocks; see `BackboneConfig`. Under diffusion the scan "forward" stands for
            "bidirectional".
        objective: what the model is trained for, by name or configuration; "causal" is autoregressive, the
            others by diffusion.
        tie_word_embeddings: whether the output matrix is the embedding.
        training: optimiser, schedule, regularisation and averaging.
        prompts: the prompts that the samples over time continue; "" is the beginning of a document.
        vocab_size: number of token ids; the data says it.
    """

    @renamed_arguments(**RENAMED_ARGUMENTS)
    def __init__(
        self,
        *,
        backbone: BackboneConfig = _BACKBONE,
        objective: ObjectiveConfig | str = "causal",
        tie_word_embeddings: bool = True,
        training: TextTrainingConfig = TextTrainingConfig(),
        prompts: list[str] = [""],  # noqa: B006 - jsonargparse cannot write a factory's value
        vocab_size: int = 257,
    ):
        super().__init__()
        config = LanguageModelConfig(
            backbone=backbone, vocab_size=vocab_size, objective=objective, tie_word_embeddings=tie_word_embeddings
        )
        diffusion = entry_of(config.objective).build.decoder != "autoregressive"
        if diffusion and backbone.scan == "forward":
            config = replace(config, backbone=replace(backbone, scan="bidirectional"))
        self.mixer, self.training_config, self.prompts = pattern_name(backbone), training, prompts
        self.model = LanguageModel(config)
        self._sums = [0.0, 0, 0]
        self.measured: dict[str, float] = {}

    def on_train_start(self) -> None:
        self._growing = round(self.training_config.length_warmup * planned_steps(self.trainer))

    def training_step(self, batch: dict[str, Any], index: int) -> dict[str, Any]:
        batch = {name: value for name, value in batch.items() if name != "bytes"}
        if self.training_config.length_warmup > 0:
            batch = cut(batch, length_at(self.trainer.global_step, self._growing, scored(batch)))
        found = self.model.loss(**batch)
        nats, count = summed(found.nats, found.count)
        self.log("train/loss", nats / count, prog_bar=True, batch_size=1)
        if len(found.parts) > 1:
            self.log_dict({f"train/{name}": value for name, value in found.parts.items()}, batch_size=1)
        return {"loss": self.weighted(found.loss, found.count, count), "nats": nats, "count": count}

    def on_validation_epoch_start(self) -> None:
        self._sums = [0.0, 0, 0]

    def validation_step(self, batch: dict[str, Any], index: int) -> None:
        # Where batches have none, the end of the epoch says what is missing.
        size = batch.get("bytes", 0)
        batch = {name: value for name, value in batch.items() if name != "bytes"}
        # Rows that only fill up a rank's last batch: it takes its step, which ranks take together, and counts nothing.
        filling = "counted" in batch and not batch["counted"][:, 1:].any()
        if filling:
            del batch["counted"]
        devices = [self.device] if self.device.type == "cuda" else []
        # The same masks at each validation, and training draws what it would have drawn without.
        with torch.random.fork_rng(devices):
            torch.manual_seed(mix(VALIDATION_SEED, index, self.global_rank))
            found = self.model.loss(**batch)
        if not filling:
            self._sums = [self._sums[0] + float(found.nats), self._sums[1] + found.count, self._sums[2] + int(size)]

    def on_validation_epoch_end(self) -> None:
        nats, tokens, size = map(sum, zip(*from_all_ranks(self.trainer, self._sums), strict=True))
        if not size:
            raise ConfigError("the held-out batches count no bytes; bits per byte need those of the tokens' text")
        self.measured = {"val_tokens": tokens, "val_bytes": size}
        self.log_dict(
            {
                "val/loss": nats / tokens,
                "val/bits_per_byte": nats / math.log(2) / size,
                "val/perplexity": math.exp(min(700.0, nats / tokens)),
            },
            prog_bar=True,
            # Equal on all ranks already; without it Lightning warns.
            sync_dist=True,
        )

    def configure_optimizers(self) -> dict[str, Any]:
        return optimise(self, self.training_config)

    def configure_callbacks(self) -> list[pl.Callback]:
        return [AverageWeights(self.training_config.ema)] if self.training_config.ema else []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["model"] = to_dict(self.model.config)


def fit(argv: list[str], objects: Mapping[str, Any] = NOTHING) -> int:
    """`omnimix text fit`."""
    return run_fit("text", argv, partial(make_cli, objects=objects), _finish)


def validate(argv: list[str]) -> int:
    """`omnimix text validate`."""
    return evaluate("validate", argv, make_cli)


# What the data says -> the argument of the model.
LINKS = [("vocab_size", "vocab_size")]


def make_cli(command: str, argv: list[str], objects: Mapping[str, Any] = NOTHING) -> RecipeCLI:
    """The command line of a subcommand; see `RecipeCLI`."""
    return RecipeCLI(
        command,
        model=TextGeneration,
        data=TextData,
        recipe=RECIPE,
        argv=argv,
        objects=objects,
        links=LINKS,
        monitor="val/bits_per_byte",
        mode="min",
        history=StepHistory(),
        callbacks=[Samples()],
    )


def _finish(cli: RecipeCLI) -> None:
    """Measure the averaged weights once more, and write model, numbers, samples and picture into the run's folder."""
    model, folder, history, [samples] = cli.model, cli.folder, cli.history, cli.callbacks
    assert isinstance(history, StepHistory) and isinstance(samples, Samples)
    measured = cli.measure()
    samples.take(cli.trainer, model)
    whole = whole_model(cli.trainer, model)
    if whole is None:
        return
    save_model(whole, folder.path)
    metrics = {
        **{name: round(value, 6) for name, value in measured.items()},
        **model.measured,
        "train_seconds": round(history.seconds, 1),
        "steps": cli.trainer.global_step,
        "tokens": history.tokens,
        "tokens_per_second": round(history.tokens / history.busy, 1) if history.busy else None,
        "objective": model.model.config.objective.type,
        "vocab_size": model.model.vocab_size,
        **cli.about(),
    }
    write_metrics(folder.metrics, metrics)
    _picture(cli, history, samples, metrics)
    write_card(folder.path, cli.task, metrics, cli.datamodule)
    _say(cli, metrics)


def _picture(cli: RecipeCLI, history: StepHistory, samples: Samples, metrics: dict[str, Any]) -> None:
    rows, every = history.rows, history.every
    training = "training" if every == 1 else f"training, each {every} steps"
    found = metrics.get("val/bits_per_byte")
    title = "not validated" if found is None else f"{found:.3f} bits per byte of held-out text"
    subtitle = (
        f"{metrics['configuration']} · mixer {metrics['mixer']} · {metrics['objective']} · "
        f"{metrics['parameters']:,} parameters · {metrics['steps']:,} steps, {metrics['tokens']:,} tokens in "
        f"{metrics['train_seconds']:.0f} s"
    )
    over_time = samples.over_time(3)
    others = samples.of_step(over_time[-1].step)[1:4]
    picture = [
        Row(
            panels=[
                curves(rows, {training: "train/loss", "held out": "val/loss"}, "nats per token", over="step"),
                curves(rows, {"held out": "val/bits_per_byte"}, "bits per byte", over="step"),
                curves(rows, {"rate": "lr"}, "learning rate", over="step"),
                curves(rows, {training: "tokens_per_second"}, "tokens per second", over="step"),
            ],
            height=4.0,
        ),
        *(
            Row(panels=[text(s.prompt + s.text, f"{s.prompt!r} after step {s.step:,}") for s in some], height=3.6)
            for some in (over_time, others)
            if some
        ),
    ]
    write_report(cli.folder.report, title, subtitle, picture)


def _say(cli: RecipeCLI, metrics: dict[str, Any]) -> None:
    folder = cli.folder
    row = {
        "run": folder.path.name,
        "mixer": metrics["mixer"],
        "objective": metrics["objective"],
        **({"bits per byte": f"{metrics['val/bits_per_byte']:.3f}"} if "val/bits_per_byte" in metrics else {}),
        **({"perplexity": f"{metrics['val/perplexity']:.2f}"} if "val/perplexity" in metrics else {}),
        "parameters": f"{metrics['parameters']:,}",
        "seconds": f"{metrics['train_seconds']:.0f}",
        "tokens / s": f"{metrics['tokens_per_second'] or 0:,.0f}",
    }
    emit("on held-out text", [row])
    say(f"picture: {folder.report}    numbers: {folder.metrics}    samples: {folder.samples}")
    say(f"write with it: omnimix text generate --run {folder.path}")
