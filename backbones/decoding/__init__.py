"""Writing with language models: token by token, by beams, with a draft model, by diffusion."""

from .config import GenerationConfig
from .diffusion import Diffusion, DiffusionConfig, diffuse
from .generate import Generation, Step, generate, stream
from .prefix import Prefix, load_prefix, read_prefix, save_prefix
from .speculative import Speculation, SpeculationConfig, speculate

__all__ = [
    "Diffusion",
    "DiffusionConfig",
    "Generation",
    "GenerationConfig",
    "Prefix",
    "Speculation",
    "SpeculationConfig",
    "Step",
    "diffuse",
    "generate",
    "load_prefix",
    "read_prefix",
    "save_prefix",
    "speculate",
    "stream",
]
