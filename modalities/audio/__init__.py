"""Audio: files, tokens, models."""
