"""Helpers that stand below everything: files, caches, the console, devices."""
