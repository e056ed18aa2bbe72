"""Recipes train routed experts: their losses count, and the balance moves once a step."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from omnimix.backbones import BackboneConfig
from omnimix.backbones.ffn import expert_loads
from omnimix.backbones.ffn.moe import MoEConfig
from omnimix.recipes.common.options import LoadingOptions
from omnimix.recipes.vision.recipe import DigitsData, VisionClassification, VisionTrainingConfig


def recipe(**options):
    torch.manual_seed(0)
    training = VisionTrainingConfig(ema=0.0, label_smoothing=0.0)
    backbone = BackboneConfig(dim=16, depth=2, scan="bidirectional", ffn=MoEConfig(experts=4, **options))
    return VisionClassification(backbone=backbone, patch=4, training=training)


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_the_experts_losses_are_part_of_the_training_loss():
    module = recipe(balance=3.0)
    batch = {"image": torch.randn(5, 1, 8, 8), "label": torch.arange(5)}
    plain = F.cross_entropy(module(batch["image"]), batch["label"])
    _, losses = module.model.forward_with_losses(batch["image"])
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(loss, plain + losses["load_balance"] + losses["router_z"])
    # Two layers at 3, more where the load is uneven.
    assert losses["load_balance"] > 5.9


def test_biases_move_by_one_step_with_each_of_the_optimiser():
    module = recipe(router="sigmoid")
    trainer = pl.Trainer(
        max_epochs=1,
        limit_train_batches=6,
        limit_val_batches=0,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=DigitsData(loading=LoadingOptions(batch_size=16)))
    assert trainer.global_step == 3
    layers = [block.ffn for block in module.model.backbone.blocks]
    assert all(0 < layer.bias.abs().max() <= 3.01 * layer.config.bias_rate for layer in layers)
    assert all(load.sum() == 0 for load in expert_loads(module).values())
