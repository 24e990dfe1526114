"""The dealing of prompts to ranks: common beginnings meet on one rank, and ranks have equal work.

Each rank derives the same from the prompts and from what the ranks have asked for.
"""

from collections import deque
from collections.abc import Sequence
from itertools import pairwise

from xpar.engine.models.kv_pool import BLOCK_TOKENS

DRAWN = 2
"""The cost of a token that is drawn, in tokens that are read; the first steps of both are alike."""


class PromptDealer:
    """Deals the prompts ``ids`` to ``ranks``.

    Each rank has a list of its own; one whose list is empty takes from the end of the longest.

    Args:
        ids: The tokens of each prompt, in the order of the queue.
        ranks: The number of ranks.
        drawn: Most new tokens of each answer.
        budget: Tokens that a rank is dealt at a time, at most; one prompt at least.
        shares_prefixes: Whether prompts that begin alike go to one rank, as far as balance allows.
    """

    def __init__(
        self,
        ids: Sequence[Sequence[int]],
        ranks: int,
        drawn: Sequence[int],
        budget: int,
        shares_prefixes: bool,
    ) -> None:
        self._ids, self._budget = ids, budget
        order = (
            sorted(range(len(ids)), key=lambda place: list(ids[place]))
            if shares_prefixes
            else range(len(ids))
        )
        groups: list[list[int]] = []
        self._costs: dict[int, int] = {}
        last: int | None = None
        for place in order:
            common = 0 if last is None or not shares_prefixes else common_tokens(ids[last], ids[place])
            if common:
                groups[-1].append(place)
            else:
                groups.append([place])
            self._costs[place] = len(ids[place]) - common + DRAWN * drawn[place]
            last = place
        self._lists: list[deque[int]] = [deque() for _ in range(ranks)]
        self._left = [0] * ranks
        most = -(-sum(self._costs.values()) // ranks)
        for group in sorted(self._split(groups, most), key=self._cost, reverse=True):
            rank = min(range(ranks), key=lambda r: self._left[r])
            self._lists[rank].extend(group)
            self._left[rank] += self._cost(group)

    def deal(self, wanted: Sequence[int]) -> list[list[int]]:
        """Deal prompts to ranks that want so many at most; return each rank's places of the queue."""
        return [self._deal_to(rank, most) for rank, most in enumerate(wanted)]

    def _deal_to(self, rank: int, most: int) -> list[int]:
        dealt: list[int] = []
        tokens = 0
        while len(dealt) < most and any(self._lists):
            own = bool(self._lists[rank])
            source = rank if own else max(range(len(self._left)), key=lambda r: self._left[r])
            place = self._lists[source][0 if own else -1]
            tokens += len(self._ids[place])
            if dealt and tokens > self._budget:
                break
            self._lists[source].popleft() if own else self._lists[source].pop()
            self._left[source] -= self._costs[place]
            dealt.append(place)
        return dealt

    def _cost(self, places: Sequence[int]) -> int:
        return sum(self._costs[place] for place in places)

    def _split(self, groups: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        """Split groups that cost more than ``most`` into equal parts, of which each reads the beginning."""
        parts: list[list[int]] = []
        for group in groups:
            number = min(len(group), -(-self._cost(group) // most)) if most else 1
            bounds = [len(group) * n // number for n in range(number + 1)]
            parts += [list(group[begin:end]) for begin, end in pairwise(bounds)]
        return parts


def common_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the tokens with which ``a`` and ``b`` begin alike, in full blocks."""
    length = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return length - length % BLOCK_TOKENS
