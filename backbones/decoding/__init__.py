"""Writing with language models: token by token, by beams, with a draft model."""

from .config import GenerationConfig
from .generate import Generation, Step, generate, stream
from .prefix import Prefix, read_prefix

__all__ = ["Generation", "GenerationConfig", "Prefix", "Step", "generate", "read_prefix", "stream"]
