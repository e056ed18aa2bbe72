"""Images: files, tokens, models."""
