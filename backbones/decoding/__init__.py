"""Writing with language models: token by token, by beams, with a draft model."""

from .config import GenerationConfig
from .generate import Generation, Step, generate, stream
from .prefix import Prefix, load_prefix, read_prefix, save_prefix
from .speculative import Speculation, SpeculationConfig, speculate

__all__ = [
    "Generation",
    "GenerationConfig",
    "Prefix",
    "Speculation",
    "SpeculationConfig",
    "Step",
    "generate",
    "load_prefix",
    "read_prefix",
    "save_prefix",
    "speculate",
    "stream",
]
