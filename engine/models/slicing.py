"""Over how many ranks each expert's width is sliced where nobody says.

A token's few experts seldom lie evenly on the ranks, and all wait for the rank that has most of them: with slices every
rank has its share of each. Ranks of one node read each other's rows in place, so that a token that goes to all of them
costs no more than one that goes to some.
"""

from collections.abc import Iterable

from xpar.engine.config import LayerConfig

LEAST_WIDTH = 256
"""Of a slice: narrower ones are products too small to read their weights at full speed."""
UNIT = 64
"""What a slice is a multiple of: products are tiled by this many columns or by divisors of it."""


def slices(ranks: int, layers: Iterable[LayerConfig]) -> int:
    """The most of ``ranks``, all on one node, that may slice each expert of ``layers``; divides ``ranks``, at least 1."""
    widths = [layer.intermediate_size for layer in layers]
    fit = (
        n
        for n in range(1, ranks + 1)
        if ranks % n == 0 and all(w % (n * UNIT) == 0 and w // n >= LEAST_WIDTH for w in widths)
    )
    return max(fit, default=1)
