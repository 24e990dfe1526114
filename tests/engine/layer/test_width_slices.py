"""The slices of an expert's width: even without blocks, whole blocks where those leave them nearly even."""

import pytest

from xpar.engine.layer.expert_shard import slice_width

SLICES = {
    "any width": (7, 3, 1, [3, 2, 2]),
    "whole blocks": (2048, 8, 128, [256] * 8),
    "gpt-oss over 8 ranks": (2880, 8, 32, [384] * 2 + [352] * 6),
    "a smaller block than 128 makes them even": (768, 4, 128, [192] * 4),
    "the last block is cut off": (1408, 4, 128, [384, 384, 384, 256]),
    "fewer blocks than ranks": (160, 3, 128, [64, 64, 32]),
    "blocks smaller than a kernel wants, where a rank had none": (48, 5, 32, [16, 8, 8, 8, 8]),
    "a group of 16": (1856, 8, 16, [240] * 4 + [224] * 4),
    "an odd block": (9, 2, 9, [5, 4]),
}


@pytest.mark.parametrize("name", SLICES)
def test_widths_of_slices(name: str) -> None:
    width, parts, unit, expected = SLICES[name]
    slices = [slice_width("width", width, parts, part, unit) for part in range(parts)]
    assert [s.stop - s.start for s in slices] == expected
    assert [s.start for s in slices] == [sum(expected[:n]) for n in range(parts)]


def test_more_ranks_than_rows() -> None:
    with pytest.raises(ValueError, match="width 2 cannot be sliced over 3 ranks; use at most 2"):
        slice_width("width", 2, 3, 0, 32)
