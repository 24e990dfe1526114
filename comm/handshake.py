"""The handshake before data moves: all ranks are here, healthy, in the same collective."""

import numpy as np

from xpar.comm.communicator import Communicator, Header, Tag

HEADER_WORDS = 14
"""int64 words of every handshake; all have the same number, so that different ones can meet"""


class CollectiveError(RuntimeError):
    """An error with the same text on every rank of a group, which cannot go on together."""


class RemoteRankError(CollectiveError):
    """At least one rank of the group failed before the handshake."""


class DesyncError(CollectiveError):
    """The ranks of a group are in different collectives, or in one with unfit arguments."""


def handshake(
    comm: Communicator,
    tag: Tag,
    *,
    same: dict[str, int] | None = None,
    values: tuple[int, ...] = (),
    failure: BaseException | None = None,
) -> Header:
    """Check that all ranks are in the same collective, and exchange a few numbers.

    Collective over ``comm``.

    Args:
        comm: The group.
        tag: The collective that this rank is about to enter.
        same: Named numbers that must be equal on all ranks.
        values: Numbers of this rank for the others.
        failure: An error of this rank since the last collective. A rank that failed still takes part, so that
            no rank waits for it, and then every rank raises.

    Returns:
        [size, len(values)] int64, the ``values`` of every rank.

    Raises:
        RemoteRankError: A rank gave a ``failure``; the same text on all ranks.
        DesyncError: The ranks differ in ``tag`` or ``same``; the same text on all ranks.
    """
    facts = same or {}
    words = (int(failure is not None), *tag.words(), len(values), *facts.values(), *values)
    if len(words) > HEADER_WORDS:
        raise ValueError(f"handshake header of {len(words)} words; at most {HEADER_WORDS}")
    header = np.zeros(HEADER_WORDS, dtype=np.int64)
    header[: len(words)] = words
    table = comm.exchange(header, tag)
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
