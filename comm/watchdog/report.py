"""The text that says where every rank is: a line for each, the missing ones by name, equal stacks once."""

from collections.abc import Sequence
from dataclasses import dataclass

from xpar.comm.partition import spans
from xpar.comm.watchdog.status_board import FAILING, INSIDE, LEFT, Call

HEADLINE = "where every rank is:"


@dataclass(frozen=True)
class RankState:
    """The facts that a survey found out about one rank, after its row of the status board (``Entry``).

    ``process``: ``stopped``, ``gone`` or empty for nothing special. ``stack``: of its threads, empty if
    unknown.
    """

    rank: int
    host: str
    state: int
    age: float
    call: Call | None
    process: str = ""
    stack: str = ""

    def has_reached(self, call: Call) -> bool:
        """Return whether the rank is in ``call`` of its group, or has been."""
        return self.call is not None and self.call.group == call.group and self.call.seq >= call.seq


def format_survey(
    seen: Sequence[RankState],
    silent: Sequence[tuple[int, str]],
    waiting: Call | None = None,
    group: Sequence[int] = (),
) -> str:
    """Write the whole report of ranks ``seen``, and (rank, host) of the ``silent`` others.

    ``waiting``: the collective of ``group`` that did not end in time, if that is the reason of the report.
    """
    text = [HEADLINE, *_lines(seen, silent)]
    if waiting is not None:
        absent = [s for s in seen if s.rank in group and not s.has_reached(waiting)]
        names = [f"rank {s.rank} on {s.host}" for s in sorted(absent, key=lambda s: s.rank)]
        names += [f"rank {rank} on {host} (not known)" for rank, host in silent if rank in group]
        text.append(
            f"never arrived in {waiting.op} #{waiting.seq}: {', '.join(names) or 'nobody is missing'}"
        )
    return "\n".join(text + _stacks(seen))


def format_head(seen: Sequence[RankState]) -> str:
    """Write the first part of a report, for a job that may be ended any moment."""
    return "\n".join([HEADLINE, *_lines(seen, [])])


def format_body(
    in_head: Sequence[RankState], seen: Sequence[RankState], silent: Sequence[tuple[int, str]]
) -> str:
    """Write the rest of a report: ranks that are not ``in_head``, and all stacks."""
    known = {s.rank for s in in_head}
    more = _lines([s for s in seen if s.rank not in known], [(r, h) for r, h in silent if r not in known])
    return "\n".join([*more, *_stacks(seen)])


def _lines(seen: Sequence[RankState], silent: Sequence[tuple[int, str]]) -> list[str]:
    lines = {s.rank: f"  rank {s.rank} on {s.host}: {_describe(s)}" for s in seen}
    lines |= {rank: f"  rank {rank} on {host}: its node does not answer" for rank, host in silent}
    return [lines[rank] for rank in sorted(lines)]


def _describe(s: RankState) -> str:
    last = "no collective so far" if s.call is None else f"the last was {s.call}"
    if s.process:
        what = f"in {s.call}" if s.state == INSIDE else f"in no collective, {last}"
        return f"its process is {s.process}; {what}"
    if s.state == INSIDE:
        return f"in {s.call}, for {s.age:.1f} s"
    if s.state == FAILING:
        return f"failed; {last}"
    if s.state == LEFT:
        return f"its program has ended {s.age:.1f} s ago; {last}"
    return f"in no collective for {s.age:.1f} s; {last}"


def _stacks(seen: Sequence[RankState]) -> list[str]:
    ranks_of: dict[str, list[int]] = {}
    for s in seen:
        if s.stack:
            ranks_of.setdefault(s.stack, []).append(s.rank)
    lines = []
    for stack, ranks in sorted(ranks_of.items(), key=lambda item: min(item[1])):
        lines += [f"stacks of rank {spans(ranks)}:", *(f"  {line}" for line in stack.splitlines())]
    return lines
