"""`omnimix vision predict`: classify image files. The training stack is not imported."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ...errors import CheckpointError, MediaError
from ...modalities import ImageClassifier, load_model
from ...modalities.data.sources import IMAGE_SUFFIXES
from ...utils.console import emit
from ...utils.run_folder import RunFolder
from ..common.prediction import (
    CPU,
    add_options,
    check_options,
    named_files,
    ranked,
    silent,
    unreadable,
    write_rows,
)
from .preprocess import ImagePreprocess

# The most pixels of images that are prepared and run together.
PIXELS = 1 << 24
_BATCH = 64


def main(argv: list[str]) -> int:
    """`omnimix vision predict`."""
    parser = argparse.ArgumentParser(
        prog="omnimix vision predict", description="Classify image files, or all images in folders."
    )
    parser.add_argument("files", nargs="+", help="image files and folders")
    add_options(parser, "image", _BATCH)
    options = parser.parse_args(argv)
    device = check_options(options)
    folder = RunFolder.finished(options.run)
    files = named_files(options.files, IMAGE_SUFFIXES, "images")
    rows = predict_files(
        folder.path, files, top=options.top, policy=options.policy, batch_size=options.batch_size, device=device
    )
    if not silent(options):
        emit(f"predictions of {folder.path}", rows)
    return write_rows(rows, options)


@torch.inference_mode()
def predict_files(
    folder: Path,
    files: list[Path],
    *,
    top: int = 1,
    policy: str = "skip",
    batch_size: int = _BATCH,
    device: torch.device = CPU,
) -> list[dict[str, Any]]:
    """One row per file and class, the most likely first: file, rank, class, probability, and why a file is unreadable.

    Raises:
        CheckpointError: the folder holds no model of this recipe.
        MediaError: an unreadable file, with `policy="raise"`.
    """
    model = load_model(folder)
    if not isinstance(model, ImageClassifier):
        raise CheckpointError(
            f"the model in {str(folder)!r} is of the class {type(model).__name__}, not an image classifier"
        )
    preprocess = ImagePreprocess.of_model(folder, model)
    model.to(device)
    batch_size = max(1, min(batch_size, PIXELS // preprocess.size**2))
    rows: list[dict[str, Any]] = []
    for at in range(0, len(files), batch_size):
        images, readable = [], []
        for path in files[at : at + batch_size]:
            try:
                images.append(preprocess.load(path))
                readable.append(path)
            except MediaError as error:
                if policy == "raise":
                    raise
                rows.append(unreadable(path, error))
        if not images:
            continue
        for path, logits in zip(readable, model(torch.stack(images).to(device)), strict=True):
            rows += ranked(path, logits, preprocess.classes, top)
    return rows
