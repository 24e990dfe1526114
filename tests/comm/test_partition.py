"""Parts of a range and the text of runs, against plain statements of their rules."""

import pytest

from xpar.comm.partition import spans, split_range, split_sizes


@pytest.mark.parametrize("total", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("parts", [1, 2, 5, 7])
def test_parts_cover_the_range_and_differ_by_at_most_one(total: int, parts: int) -> None:
    sizes = split_sizes(total, parts)
    assert len(sizes) == parts and sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)
    covered = [n for p in range(parts) for n in range(total)[split_range(total, parts, p)]]
    assert covered == list(range(total))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([], ""), ([4], "4"), ([7, 3, 1, 2], "1-3, 7"), ([0, 1, 3, 4, 6], "0-1, 3-4, 6")],
)
def test_runs_are_shortened(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text
