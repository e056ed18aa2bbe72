"""Text: tokenizers, conversations, generation."""
