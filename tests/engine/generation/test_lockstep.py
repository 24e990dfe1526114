"""How lockstep deals prompts to the ranks."""

from hypothesis import given
from hypothesis import strategies as st

from xpar.engine.generation.lockstep import deal_prompts


@given(free=st.lists(st.integers(0, 5), min_size=1, max_size=6), left=st.integers(0, 30))
def test_deal_gives_out_all_that_fits_and_evenly(free: list[int], left: int) -> None:
    parts = deal_prompts(free, left)
    assert sum(parts) == min(left, sum(free))
    assert all(0 <= part <= slots for part, slots in zip(parts, free, strict=True))
    for part, slots in zip(parts, free, strict=True):  # nobody with room is two behind anybody
        assert part == slots or part >= max(parts) - 1
