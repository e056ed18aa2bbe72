"""What the adapters import on demand: other packages, and runs."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from ..backbones.language import LanguageModel
from ..errors import CheckpointError, MissingPackage

if TYPE_CHECKING:
    from ..modalities.text.tokenizer import Tokenizer


@contextlib.contextmanager
def source_hidden() -> Iterator[None]:
    """Without our own folder on the path, where Python was started in a clone.

    transformers would take the folder `kernels` for Hugging Face's package of that name, and fail on it.
    """
    own = Path(__file__).resolve().parents[1]
    before = list(sys.path)
    sys.path[:] = [entry for entry in before if Path(entry or ".").resolve() != own]
    try:
        yield
    finally:
        sys.path[:] = before


def wanted(package: str, purpose: str, extra: str) -> ModuleType:
    """The package, imported with our own folder hidden.

    Raises:
        MissingPackage: it is not installed; the message names the extra that brings it.
    """
    with source_hidden():
        try:
            return importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise
            raise MissingPackage(package, purpose, extra) from error


def load_language_model(run: str | Path) -> tuple[LanguageModel, Tokenizer]:
    """Model and tokenizer of a run.

    Args:
        run: its folder, or its name under `runs/`; or any folder of a saved model with its tokenizer.

    Raises:
        CheckpointError: no such run, or what it holds is no language model.
    """
    from ..modalities import load_model
    from ..modalities.common.weights import CONFIG
    from ..modalities.text.tokenizer import load_tokenizer
    from ..utils.run_folder import RunFolder

    folder = Path(run) if (Path(run) / CONFIG).is_file() else RunFolder.finished(str(run)).path
    model = load_model(folder)
    if not isinstance(model, LanguageModel):
        raise CheckpointError(f"{str(folder)!r} holds a {type(model).__name__}, and a LanguageModel is wanted")
    return model, load_tokenizer(folder)
