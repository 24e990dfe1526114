"""The one text that says where every rank is: a line each, those that never arrived by name, alike stacks once."""

from collections.abc import Sequence
from dataclasses import dataclass

from xpar.comm.watchdog.status_board import FAILING, INSIDE, LEFT, Call

WHERE = "where every rank is:"


@dataclass(frozen=True)
class RankState:
    """What was found out about one rank. ``process``: ``stopped``, ``gone`` or nothing special. ``stack``: its threads."""

    rank: int
    host: str
    state: int
    age: float
    call: Call | None
    process: str = ""
    stack: str = ""

    def at(self, call: Call) -> bool:
        """Whether it is in ``call`` of its group, or has been."""
        return self.call is not None and self.call.group == call.group and self.call.seq >= call.seq


def format_rank(
    seen: Sequence[RankState],
    silent: Sequence[tuple[int, str]],
    waiting: Call | None = None,
    group: Sequence[int] = (),
) -> str:
    """``seen``: of the ranks that could be asked about; ``silent``: (rank, host) of the others.

    ``waiting``: the collective that did not end, of the ranks ``group``.
    """
    text = [WHERE, *_lines(seen, silent)]
    if waiting is not None:
        absent = [s for s in seen if s.rank in group and not s.at(waiting)]
        names = [f"rank {s.rank} on {s.host}" for s in sorted(absent, key=lambda s: s.rank)]
        names += [f"rank {rank} on {host} (not known)" for rank, host in silent if rank in group]
        text.append(
            f"never arrived in {waiting.op} #{waiting.seq}: {', '.join(names) or 'nobody is missing'}"
        )
    return "\n".join(text + _stacks(seen))


def format_head(seen: Sequence[RankState]) -> str:
    """What is known at once, for a job that may be ended any moment; :func:`format_body` adds the rest."""
    return "\n".join([WHERE, *_lines(seen, [])])


def format_body(
    begun: Sequence[RankState], seen: Sequence[RankState], silent: Sequence[tuple[int, str]]
) -> str:
    """The ranks that :func:`format_head` did not have, and the stacks of all."""
    known = {s.rank for s in begun}
    more = _lines([s for s in seen if s.rank not in known], [(r, h) for r, h in silent if r not in known])
    return "\n".join([*more, *_stacks(seen)])


def _lines(seen: Sequence[RankState], silent: Sequence[tuple[int, str]]) -> list[str]:
    lines = {s.rank: f"  rank {s.rank} on {s.host}: {_where(s)}" for s in seen}
    lines |= {rank: f"  rank {rank} on {host}: its node does not answer" for rank, host in silent}
    return [lines[rank] for rank in sorted(lines)]


def _where(s: RankState) -> str:
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
    alike: dict[str, list[int]] = {}
    for s in seen:
        if s.stack:
            alike.setdefault(s.stack, []).append(s.rank)
    lines = []
    for stack, ranks in sorted(alike.items(), key=lambda item: min(item[1])):
        lines += [f"stacks of rank {spans(ranks)}:", *(f"  {line}" for line in stack.splitlines())]
    return lines


def spans(numbers: Sequence[int]) -> str:
    """``0, 2-5``."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
