"""Which parts of a job are measured, and what a point's speed is worth beside that of the baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xpar.engine.console.terminal import count

MODES = ("strong", "weak")
"""The same work in all, or the same work a rank."""


@dataclass(frozen=True, order=True)
class Point:
    """The first ``ranks`` ranks of the job, which lie on its first ``nodes`` nodes."""

    ranks: int
    nodes: int

    def __str__(self) -> str:
        return f"{count(self.ranks, 'rank')} on {count(self.nodes, 'node')}"


def numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """``1,2,4`` as numbers; None where nothing was given. Raises ValueError that names ``option``."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} {text!r}: numbers of at least 1 with commas between them, such as 1,2,4")
    return tuple(int(part) for part in parts)


def points_of(
    node_of: Sequence[int], ranks: Sequence[int] | None = None, nodes: Sequence[int] | None = None
) -> list[Point]:
    """Ascending points of a job whose rank r lies on node ``node_of[r]``, an ascending sequence.

    ``ranks``: numbers of ranks; ``nodes``: numbers of whole nodes. By default powers of two up to all ranks, and all.
    Raises ValueError for more than the job has.
    """
    size, num_nodes = len(node_of), node_of[-1] + 1
    for what, asked, most in (("ranks", ranks, size), ("nodes", nodes, num_nodes)):
        if asked and max(asked) > most:
            raise ValueError(
                f"--{what} {max(asked)}: the job has {most}; start a larger one, or ask for less"
            )
    wanted = set(ranks or ())
    wanted |= {sum(node < n for node in node_of) for n in nodes or ()}
    if ranks is None and nodes is None:
        wanted = {2**i for i in range(size.bit_length()) if 2**i < size} | {size}
    return [Point(n, node_of[n - 1] + 1) for n in sorted(wanted)]


def baseline_of(record: Mapping[str, Any]) -> dict[str, int]:
    """What a figure relative to ``record`` must name."""
    return {key: record[key] for key in ("ranks", "nodes", "threads")}


def baseline_name(baseline: Mapping[str, int]) -> str:
    """``1 rank x 2 threads on 1 node``."""
    return (
        f"{count(baseline['ranks'], 'rank')} x {count(baseline['threads'], 'thread')} "
        f"on {count(baseline['nodes'], 'node')}"
    )


def relative(record: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """Speed-up and parallel efficiency of ``record`` and what they are relative to.

    Speed is tokens a second; efficiency is the speed of a rank over that of a rank of the baseline, for the same work
    in all (strong) and the same work a rank (weak) alike.
    """
    speedup = record["tokens_per_s"] / baseline["tokens_per_s"]
    return {
        "speedup": speedup,
        "efficiency": speedup * baseline["ranks"] / record["ranks"],
        "baseline": baseline_of(baseline),
    }
