"""Builds on disk: found, verified, locked, published and kept finite."""
