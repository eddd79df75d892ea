"""Decoded media to model inputs: pure functions of arrays."""
