"""Parts that the recipes of several modalities share."""
