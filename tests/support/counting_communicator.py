"""A group that counts the collectives asked of it, for tests of how many a result costs."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from xpar.comm.communicator import Communicator


class Counting:
    """``inner``, with the number of its ``calls``; what only plans and hands round rows is not counted."""

    def __init__(self, inner: Communicator) -> None:
        self.inner, self.calls = inner, Counter[str]()

    def all_reduce(self, x: Tensor) -> Tensor:
        self.calls["all_reduce"] += 1
        return self.inner.all_reduce(x)

    def all_gather_v(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        self.calls["all_gather"] += 1
        return self.inner.all_gather_v(x, counts)

    def reduce_scatter_v(self, x: Tensor, counts: Sequence[int], planned: bool = False) -> Tensor:
        self.calls["reduce_scatter"] += 1
        return self.inner.reduce_scatter_v(x, counts, planned)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
