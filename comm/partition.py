"""Contiguous parts of a range, which need not be equal."""

from collections.abc import Iterable


def split_sizes(total: int, parts: int) -> list[int]:
    """Return ``parts`` sizes that add up to ``total`` and differ by at most 1, in order."""
    base, rest = divmod(total, parts)
    return [base + (p < rest) for p in range(parts)]


def split_range(total: int, parts: int, part: int) -> slice:
    """Return part number ``part`` of ``range(total)``, cut as :func:`split_sizes` says."""
    sizes = split_sizes(total, parts)
    first = sum(sizes[:part])
    return slice(first, first + sizes[part])


def spans(numbers: Iterable[int]) -> str:
    """Write numbers in ascending order with runs shortened: ``0, 2-5``."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
