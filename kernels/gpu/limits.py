"""Sizes and numbers that the parts around kernels must know without importing Triton."""

import zlib

MOST_RANKS = 64
"""Ranks that a window has flags for."""
MOST_LAYERS = 2046
_SIZES = 20  # low bits of a label, for what must be alike besides the layer


def round_up(width: int, multiple: int) -> int:
    """Return the least multiple of ``multiple`` that is at least ``width``."""
    return -(-width // multiple) * multiple


def label_of(layer: int, *alike: int) -> int:
    """Return the 31 bits that name an exchange: its layer, and a digest of what must be alike on all ranks.

    ``layer``: -1 outside layers. Without ``alike`` the digest is 0.
    """
    digest = zlib.crc32(repr(alike).encode()) & ((1 << _SIZES) - 1) if alike else 0
    return (min(layer, MOST_LAYERS - 1) + 1) << _SIZES | digest


def layer_of(label: int) -> int:
    """Return the layer of a label; -1 without one."""
    return (label >> _SIZES) - 1
