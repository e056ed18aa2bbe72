"""Videos: files, tokens, models."""
