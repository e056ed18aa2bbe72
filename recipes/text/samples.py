"""What a language model writes while it is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from ...backbones import LanguageModel
from ...backbones.decoding import DiffusionConfig, GenerationConfig
from ...modalities.text.text_generator import TextGenerator
from ...modalities.text.tokenizer import Tokenizer
from ...utils.console import write_atomically
from ...utils.run_folder import RunFolder
from ..common.strategies import whole_model


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What was written at a step: the prompt, and the model's continuation."""

    step: int
    prompt: str
    text: str


class Samples(Callback):
    """Lets the model continue the module's `prompts` at each validation, always with the same seed.

    All of it stands in the run's `samples.txt`; it is part of the checkpoint, so a resumed run has it from the start.

    Args:
        tokens: to generate after each prompt.
        temperature: of the choice among tokens.
        top_p: part of the probability that is chosen from.
        seed: of the choice.
    """

    def __init__(self, tokens: int = 160, temperature: float = 0.8, top_p: float = 0.95, seed: int = 0):
        self.tokens = tokens
        self.options = {"temperature": temperature, "top_p": top_p, "seed": seed}
        self.samples: list[Sample] = []

    def on_fit_start(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        folder = RunFolder(Path(trainer.default_root_dir))
        if trainer.datamodule is not None and trainer.is_global_zero and not folder.tokenizer.is_file():
            trainer.datamodule.tokenizer.save(folder.path)

    # Not at the validation's end: only until here are the averaged weights in the module's place.
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.take(trainer, pl_module)

    def take(self, trainer: Any, pl_module: Any) -> None:
        """Write once more, unless it is the step of the last time, whose samples are then replaced."""
        model = whole_model(trainer, pl_module)
        if model is None:
            return
        assert isinstance(model, LanguageModel)
        step = trainer.global_step
        devices = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            written = self._write(model, trainer.datamodule.tokenizer, pl_module.prompts)
        new = [Sample(step=step, prompt=a, text=b) for a, b in zip(pl_module.prompts, written, strict=True)]
        self.samples = [sample for sample in self.samples if sample.step != step] + new
        blocks = [f"── step {s.step}, from {s.prompt!r}\n{s.prompt}{s.text}\n" for s in self.samples]
        write_atomically(RunFolder(Path(trainer.default_root_dir)).samples, "\n".join(blocks))

    def _write(self, model: LanguageModel, tokenizer: Tokenizer, prompts: list[str]) -> list[str]:
        writer = TextGenerator(model, tokenizer)
        if writer.diffusion:
            # A denoising step for each token would take as long as many steps of training.
            config = DiffusionConfig(max_new_tokens=self.tokens, steps=-(-self.tokens // 5), **self.options)
        else:
            config = GenerationConfig(max_new_tokens=self.tokens, **self.options)
        return [result.text for result in writer.generate(prompts, config)]

    def of_step(self, step: int) -> list[Sample]:
        """What was written at a step, by prompt."""
        return [sample for sample in self.samples if sample.step == step]

    def over_time(self, most: int) -> list[Sample]:
        """What was made of the first prompt, at most so many times, evenly from the first step to the last."""
        steps = list(dict.fromkeys(sample.step for sample in self.samples))
        if len(steps) > most:
            steps = [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]
        return [self.of_step(step)[0] for step in steps]

    def state_dict(self) -> dict[str, Any]:
        return {"samples": [asdict(sample) for sample in self.samples]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples = [Sample(**sample) for sample in state["samples"]]
