"""The points of a study, and the speed of a point relative to the baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xpar.engine.console.terminal import count

MODES = ("strong", "weak")
"""strong: the same work at every point. weak: the same work per rank."""


@dataclass(frozen=True, order=True)
class Point:
    """The first ``ranks`` ranks of the job, which are on its first ``nodes`` nodes."""

    ranks: int
    nodes: int

    def __str__(self) -> str:
        return f"{count(self.ranks, 'rank')} on {count(self.nodes, 'node')}"


def read_numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Read ``1,2,4`` as numbers; None stays None. Raises ValueError that names ``option``."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{option} {text!r}: numbers of at least 1 with commas between them, such as 1,2,4")
    return tuple(int(part) for part in parts)


def choose_points(
    node_of: Sequence[int], ranks: Sequence[int] | None = None, nodes: Sequence[int] | None = None
) -> list[Point]:
    """Choose points of ``ranks`` ranks and ``nodes`` whole nodes, ascending; ValueError for too many.

    Without both they are powers of two up to all ranks, and all ranks. ``node_of``: of each rank, ascending.
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


def describe_baseline(result: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers that a figure relative to ``result`` must name."""
    return {key: result[key] for key in ("ranks", "nodes", "threads")}


def format_baseline(baseline: Mapping[str, int]) -> str:
    """Format a baseline: ``1 rank x 2 threads on 1 node``."""
    return (
        f"{count(baseline['ranks'], 'rank')} x {count(baseline['threads'], 'thread')} "
        f"on {count(baseline['nodes'], 'node')}"
    )


def compute_relative_speed(result: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """Compute speed-up (of tokens/s) and efficiency (per rank) of ``result`` over ``baseline``."""
    speedup = result["tokens_per_s"] / baseline["tokens_per_s"]
    return {
        "speedup": speedup,
        "efficiency": speedup * baseline["ranks"] / result["ranks"],
        "baseline": describe_baseline(baseline),
    }
