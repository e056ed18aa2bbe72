"""Small saved models of each kind."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import omnimix as om
from omnimix.modalities import ByteTokenizer, write_audio, write_video
from omnimix.modalities.models import save_model

CLASSES = ["cat", "dog", "owl"]
SQUARE = {"classes": CLASSES, "size": 16, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3, "crop": 0.8}
CLIP = SQUARE | {"frames": 4, "sampling": "uniform", "rate": 8.0, "seconds": 1.0}


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A folder with a saved model of each kind, and files for them."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    small = {"classes": 3, "dim": 16, "depth": 1}
    image = om.create_model("vit_tiny_gla_patch16_224", **small, size=16, patch=4)
    video = om.create_model("vivit_tiny_gla_patch16_224", **small, size=(4, 16, 16))
    audio = om.create_model("ast_tiny_gla", **small)
    rate = audio.tokenizer.config.rate
    heard = {"classes": CLASSES, "rate": rate, "seconds": None}
    for name, model, details in (("image", image, SQUARE), ("video", video, CLIP), ("audio", audio, heard)):
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        save_model(model, folder / name, details={"preprocess": details})
    for i, place in enumerate(("one", "two")):
        (folder / "images").mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{place}.png")
        wave = 0.1 * torch.randn(1, rate + 100 * i)
        write_audio(folder / f"{place}.wav", wave, rate)
    frames = torch.randint(0, 255, (8, 3, 20, 24), dtype=torch.uint8)
    write_video(folder / "clip.mp4", frames, rate=8)
    backbone = om.BackboneConfig(dim=16, depth=1)
    save_model(om.LanguageModel(om.LanguageModelConfig(backbone=backbone, vocab_size=257)), folder / "text")
    ByteTokenizer().save(folder / "text")
    return folder
