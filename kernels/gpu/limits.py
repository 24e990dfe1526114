"""Sizes that the parts around the one-sided kernels must know without importing Triton."""

MOST_RANKS = 64
"""Ranks that a window has flags for."""
