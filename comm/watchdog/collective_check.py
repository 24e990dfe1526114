"""Whether the ranks of a group are about to enter the same collective with sizes that fit: ``--debug-collectives``."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CollectiveSignature:
    """What a rank is about to do. ``op``, ``dtype`` and ``shape`` must be alike on all ranks; of ``shape`` only the part
    that must be.

    ``send``, ``recv``: rows to and from each rank; what one sends another must expect. ``skip``: a rank that nothing goes
    to and nothing comes from.
    """

    op: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    send: tuple[int, ...] = ()
    recv: tuple[int, ...] = ()
    skip: int | None = None

    @classmethod
    def of(cls, op: str, x: Tensor, shape: Sequence[int]) -> "CollectiveSignature":
        return cls(op, str(x.dtype).removeprefix("torch."), tuple(shape))

    def __str__(self) -> str:
        return self.op + (f" of {self.dtype} {list(self.shape)}" if self.dtype else "")


def difference(intents: Sequence[CollectiveSignature], world_ranks: Sequence[int]) -> str | None:
    """Who differs and how, in the group whose ranks are ``world_ranks``; None if all fit.

    The one that most ranks do is taken for the right one, or the first rank's where no single one is.
    """
    said = [str(i) for i in intents]
    right, votes = Counter(said).most_common(1)[0]
    if votes < len(said):
        return "\n".join(
            [
                f"rank {world_ranks[r]} differs: {what}, where {votes} of {len(said)} ranks call {right}"
                for r, what in enumerate(said)
                if what != right
            ]
        )
    if not intents[0].send:
        return None
    lines = []
    for s, source in enumerate(intents):
        for t, target in enumerate(intents):
            if source.send[t] != target.recv[s] and s != target.skip and t != source.skip:
                lines.append(
                    f"rank {world_ranks[s]} sends {source.send[t]} rows to rank {world_ranks[t]}, which expects "
                    f"{target.recv[s]} in {said[0]}"
                )
    return "\n".join(lines) or None
