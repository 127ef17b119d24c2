"""Runs emitted CUDA on host threads, where the sanitizers can see it."""
