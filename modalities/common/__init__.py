"""Parts that the models of several modalities share."""
