"""How long a job may stand still, as options of the commands that run on several ranks."""

import argparse

from rich.table import Table

from xpar.comm.stragglers import Lateness
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.watchdog.watchdog import WatchdogOptions
from xpar.comm.world import World


def add_watching(p: argparse.ArgumentParser, stragglers: bool = False) -> None:
    """Add ``--deadline`` and ``--debug-collectives``, and ``--stragglers`` where the command prints that report."""
    p.add_argument(
        "--deadline",
        type=_deadlines,
        default=Deadlines(),
        metavar="SECONDS",
        help="a rank that keeps the others waiting longer ends the job, with a report (default 60; five times as long "
        "while it starts)",
    )
    p.add_argument(
        "--debug-collectives",
        action="store_true",
        help="compare operation, shapes and dtypes on all ranks before every collective (slow)",
    )
    if stragglers:
        p.add_argument(
            "--stragglers", action="store_true", help="show at the end who keeps the others waiting"
        )


def attach(args: argparse.Namespace) -> World:
    """Join the MPI job as the options say."""
    keeps = getattr(args, "stragglers", False)
    return World.attach(deadlines=args.deadline, watchdog=WatchdogOptions(args.debug_collectives, keeps))


def lateness_table(rows: list[Lateness], hosts: tuple[str, ...]) -> Table:
    """A line a rank, the latest one first."""
    table = Table(
        title="how late each rank came to its collectives, after the first one", title_justify="left"
    )
    for column in ("rank", "host", "collectives", "p50 ms", "p99 ms", "last"):
        table.add_column(column, justify="left" if column == "host" else "right")
    for r in sorted(rows, key=lambda r: -r.p50):
        table.add_row(
            str(r.rank),
            hosts[r.rank],
            str(r.collectives),
            f"{r.p50 * 1e3:.3f}",
            f"{r.p99 * 1e3:.3f}",
            f"{r.last:.0%}",
        )
    return table


def _deadlines(text: str) -> Deadlines:
    try:
        return Deadlines.of_step(float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
