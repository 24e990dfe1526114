"""Cutting a range into shares that need not be equal."""


def split_sizes(total: int, parts: int) -> list[int]:
    """``parts`` sizes that differ by at most one and add up to ``total``; the first ones are larger."""
    base, rest = divmod(total, parts)
    return [base + (p < rest) for p in range(parts)]


def split_range(total: int, parts: int, part: int) -> slice:
    """The range that share ``part`` covers."""
    sizes = split_sizes(total, parts)
    first = sum(sizes[:part])
    return slice(first, first + sizes[part])
