"""The small agreement that precedes data movement: everyone is here, healthy, and in the same collective."""

import zlib
from dataclasses import dataclass

import numpy as np

from xpar.comm.communicator import Communicator, Header

RECORD_WORDS = 12
"""Every handshake exchanges this many int64 words, so that two different ones can meet and be told apart."""


class CollectiveError(RuntimeError):
    """Raised with the same text on every rank of a group: the group cannot go on together."""


class RemoteRankError(CollectiveError):
    """At least one rank failed before the exchange."""


class DesyncError(CollectiveError):
    """The ranks of a group are in different collectives, or in the same one with incompatible arguments."""


@dataclass(frozen=True)
class Tag:
    """What a rank believes it is doing: operation, layer, step. ``rows`` of ``row_bytes`` bytes: for reports alone."""

    op: str
    layer: int = -1
    step: int = -1
    rows: int = 0
    row_bytes: int = 0

    def __str__(self) -> str:
        return (
            self.op
            + (f" layer {self.layer}" if self.layer >= 0 else "")
            + (f" step {self.step}" if self.step >= 0 else "")
        )

    def words(self) -> tuple[int, int, int]:
        return zlib.crc32(self.op.encode()), self.layer, self.step


def handshake(
    comm: Communicator,
    tag: Tag,
    *,
    same: dict[str, int] | None = None,
    values: tuple[int, ...] = (),
    failure: BaseException | None = None,
) -> Header:
    """Exchange one record; return [size, len(values)] int64, the ``values`` of every rank.

    ``same``: named facts that must be equal on all ranks. ``failure``: what went wrong on this rank before it
    came here; it still comes, so that nobody waits for it, and then every rank raises.

    Raises :class:`RemoteRankError` or :class:`DesyncError`, with one text on all ranks.
    """
    facts = same or {}
    words = (int(failure is not None), *tag.words(), len(values), *facts.values(), *values)
    if len(words) > RECORD_WORDS:
        raise ValueError(f"handshake record of {len(words)} words; at most {RECORD_WORDS}")
    record = np.zeros(RECORD_WORDS, dtype=np.int64)
    record[: len(words)] = words
    table = comm.exchange(record, tag)
    if table[:, 0].any():
        raise RemoteRankError(_failure_report(comm, tag, failure))
    head = 5 + len(facts)
    if not (table[:, 1:head] == table[0, 1:head]).all():
        raise DesyncError(_desync_report(comm, tag, facts))
    return table[:, head : head + len(values)]


def _failure_report(comm: Communicator, tag: Tag, failure: BaseException | None) -> str:
    texts = comm.all_gather_object(None if failure is None else f"{type(failure).__name__}: {failure}")
    lines = [f"  rank {comm.world_ranks[r]}: {t}" for r, t in enumerate(texts) if t is not None]
    return f"{tag}: failed on {len(lines)} of {comm.size} ranks of group {comm.name}\n" + "\n".join(lines)


def _desync_report(comm: Communicator, tag: Tag, facts: dict[str, int]) -> str:
    mine = f"{tag} ({', '.join(f'{k}={v}' for k, v in facts.items())})"
    lines = [f"  rank {comm.world_ranks[r]}: {t}" for r, t in enumerate(comm.all_gather_object(mine))]
    return (
        f"the ranks of group {comm.name} met in different collectives; every rank must call the same "
        "sequence with matching sizes\n" + "\n".join(lines)
    )
