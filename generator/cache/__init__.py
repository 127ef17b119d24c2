"""Builds on disk: found, verified, locked, published, loaded and bounded in size."""
