"""Models of transformers from a folder that may be a stranger's: what cannot be is a CheckpointError."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..modalities.common.weights import WEIGHTS, build_config, check_finite, stored_types

__all__ = ["Checked", "build_config"]


class Checked:
    """Put in front of transformers' `PreTrainedModel`, whose `from_pretrained` it checks."""

    @classmethod
    def from_pretrained(cls, source: Any, *arguments: Any, config: Any = None, **options: Any) -> Any:
        """As transformers'.

        Raises:
            CheckpointError: a configuration that describes no model of ours, or other weights than its model has:
                other sizes, integers in place of numbers, NaN or infinity.
        """
        if config is None:
            config = cls.config_class.from_pretrained(source)
        file = Path(source) / WEIGHTS
        types = stored_types(file) if file.is_file() else {}
        blocks = {found[1] for name in types if (found := re.match(r"model\.backbone\.blocks\.(\d+)\.", name))}
        backbone = config.language_model().backbone
        # Blocks that share all their weights are stored once.
        if blocks and backbone.depth > len(blocks) and not any(entry.tie for entry in backbone.layers):
            raise CheckpointError(
                f"{file} has {len(blocks)} blocks, and the model {backbone.depth}; nothing was loaded"
            )
        try:
            loaded = super().from_pretrained(source, *arguments, config=config, **options)
        except (RuntimeError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{source} holds no such model: {' '.join(str(error).split())}") from error
        parameters = dict((loaded[0] if isinstance(loaded, tuple) else loaded).named_parameters())
        for name in parameters.keys() & types.keys():
            if not re.match(r"B?F\d", types[name]):
                raise CheckpointError(f"{file}: {name} holds {types[name]}, and weights are floating-point numbers")
        check_finite(parameters, source)
        return loaded
