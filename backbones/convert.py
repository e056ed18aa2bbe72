"""A diffusion model from an autoregressive one's weights."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..errors import ConfigError, UnsupportedCall
from .config import ObjectiveConfig
from .heads import get_objective
from .heads.denoiser import DenoiserConfig
from .language import LanguageModel, LanguageModelConfig
from .layer import unfit


def convert(model: LanguageModel, objective: str = "masked", options: ObjectiveConfig | None = None) -> LanguageModel:
    """A model for `objective` that starts from what `model` has learned (arXiv 2410.17891, 2508.15487).

    All weights are copied. The mask token's embedding is the mean of the others. Predictions stay where they were, at
    the place before each token (`shift=True`). Attention is bidirectional as it is; causal mixers become
    `scan="bidirectional"`, where each layer's backward direction starts as a copy of its forward one. Then train it;
    `MaskedConfig.anneal_steps` opens the view ahead step by step.

    Args:
        model: of objective "causal"; it is not changed. Layers that predict several tokens ahead are left out.
        objective: "masked", "block" or "sedd".
        options: of the objective, with `shift=True`; its defaults with that otherwise.

    Raises:
        UnsupportedCall: the model or the objective is not of that kind, the options do not shift, or a mixer cannot
            be bidirectional.
        ConfigError: the options are another objective's.
    """
    if model.objective.decoder != "autoregressive":
        raise UnsupportedCall(f"model: its objective is {model.config.objective_name!r} already; pass a causal model")
    kind = get_objective(objective)
    if kind.build.decoder != "diffusion":
        raise UnsupportedCall(f"objective: {objective!r} is none of diffusion; use 'masked', 'block' or 'sedd'")
    options = kind.config(shift=True) if options is None else options
    if not isinstance(options, DenoiserConfig) or type(options) is not kind.config:
        raise ConfigError(
            f"options is a {type(options).__name__}; objective {objective!r} takes a {kind.config.__name__}"
        )
    if not options.shift:
        raise UnsupportedCall(
            "options.shift is False, but the model has learned to predict each token at the place before it; set "
            "shift=True"
        )
    backbone = model.config.backbone
    autoregressive = getattr(options, "block", None) == 1
    if not autoregressive and unfit(model.backbone, lambda can: can.bidirectional):
        backbone = replace(backbone, scan="bidirectional")
    config = LanguageModelConfig(
        backbone=backbone,
        vocab_size=model.vocab_size,
        objective=options,
        tie_word_embeddings=model.config.tie_word_embeddings,
    )
    weight = model.embedding.weight
    converted = LanguageModel(config).to(device=weight.device, dtype=weight.dtype)
    _copy(model, converted)
    return converted.train(model.training)


@torch.no_grad()
def _copy(source: LanguageModel, target: LanguageModel) -> None:
    weights = {name: w for name, w in source.state_dict().items() if not name.startswith("objective.")}
    for name in target.state_dict():
        if name not in weights:
            # The backward direction's weights are named as the forward one's, but for the branch's number.
            weights[name] = weights[name.replace(".branches.1.", ".branches.0.")]
    rows = weights["embedding.weight"]
    weights["embedding.weight"] = torch.cat([rows, rows.mean(0, keepdim=True)])
    if target.config.tie_word_embeddings:
        weights["head.weight"] = weights["embedding.weight"]
    target.load_state_dict(weights)
