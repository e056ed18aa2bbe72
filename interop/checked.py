"""Models of transformers from a folder that may be a stranger's: what cannot be is a CheckpointError."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..modalities.common.weights import check_blocks, check_finite, stored_types

# Options of `from_pretrained` that say where the files are.
_WHERE = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class Checked:
    """Put in front of transformers' `PreTrainedModel`, whose `from_pretrained` it checks."""

    config_class: Any

    @classmethod
    def from_pretrained(cls, source: Any, *arguments: Any, config: Any = None, **options: Any) -> Any:
        """As transformers'.

        Raises:
            CheckpointError: a configuration that describes no model of ours, or other weights than its model has:
                other sizes, integers in place of numbers, NaN or infinity.
        """
        described = config
        if not isinstance(described, cls.config_class):
            where = {name: options[name] for name in _WHERE if name in options}
            described = cls.config_class.from_pretrained(source if config is None else config, **where)
        backbone = described.language_model().backbone
        # Large models have their weights in several files; without a source they are an argument.
        folder = None if source is None else Path(source) / (options.get("subfolder") or "")
        types = {} if folder is None else {file: stored_types(file) for file in folder.glob("model*.safetensors")}
        if folder is not None and types:
            check_blocks([name for names in types.values() for name in names], backbone, folder, prefix="model.")
        model_class: Any = super()
        try:
            loaded = model_class.from_pretrained(source, *arguments, config=config, **options)
        except (RuntimeError, OverflowError) as error:
            if isinstance(error, CheckpointError | torch.OutOfMemoryError):
                raise
            raise CheckpointError(f"{source} holds no such model: {' '.join(str(error).split())}") from error
        parameters = dict((loaded[0] if isinstance(loaded, tuple) else loaded).named_parameters())
        for file, names in types.items():
            for name in parameters.keys() & names.keys():
                if not re.match(r"B?F\d", names[name]):
                    raise CheckpointError(f"{file}: {name} holds {names[name]}, and weights are floating-point numbers")
        check_finite(parameters, str(source))
        return loaded
