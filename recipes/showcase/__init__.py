"""Real data for measuring the recipes with their defaults, and the models of others that they are compared with."""
