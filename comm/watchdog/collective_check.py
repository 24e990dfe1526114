"""The comparison of all ranks' next collective (``--debug-collectives``)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CollectiveSignature:
    """The collective that one rank is about to enter; ``op``, ``dtype`` and ``shape`` are the same on all.

    Attributes:
        shape: The part of the tensor's shape that must be the same on all ranks.
        send: Rows to each rank; the other rank must expect as many.
        recv: Rows from each rank.
        skip: A rank with which no row is exchanged.
    """

    op: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    send: tuple[int, ...] = ()
    recv: tuple[int, ...] = ()
    skip: int | None = None

    @classmethod
    def of(cls, op: str, x: Tensor, shape: Sequence[int]) -> "CollectiveSignature":
        """Make the signature of ``op`` on ``x``; ``shape`` must be the same on all ranks."""
        return cls(op, str(x.dtype).removeprefix("torch."), tuple(shape))

    def __str__(self) -> str:
        return self.op + (f" of {self.dtype} {list(self.shape)}" if self.dtype else "")


def find_difference(signatures: Sequence[CollectiveSignature], world_ranks: Sequence[int]) -> str | None:
    """Describe which of ``world_ranks`` differ and how; None if all signatures fit.

    The most frequent signature counts as the right one, or the first rank's without a most frequent one.
    """
    texts = [str(s) for s in signatures]
    right, votes = Counter(texts).most_common(1)[0]
    if votes < len(texts):
        return "\n".join(
            [
                f"rank {world_ranks[r]} differs: {text}, where {votes} of {len(texts)} ranks call {right}"
                for r, text in enumerate(texts)
                if text != right
            ]
        )
    if not signatures[0].send:
        return None
    lines = []
    for s, source in enumerate(signatures):
        for t, target in enumerate(signatures):
            if source.send[t] != target.recv[s] and s != target.skip and t != source.skip:
                lines.append(
                    f"rank {world_ranks[s]} sends {source.send[t]} rows to rank {world_ranks[t]}, which "
                    f"expects {target.recv[s]} in {texts[0]}"
                )
    return "\n".join(lines) or None
