"""What people see: rank 0's standard output, and a progress bar on its stderr for steps that take long."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from xpar.comm.world import World

T = TypeVar("T")
WIDTH = 130
"""Columns of what goes to a file or a batch log, which has no width of its own."""


def make_console(world: World) -> Console:
    """The console of rank 0; those of other ranks print nothing."""
    console = Console(quiet=world.rank != 0, highlight=False)
    return console if console.is_terminal else Console(quiet=console.quiet, highlight=False, width=WIDTH)


def progress(world: World, items: Sequence[T], doing: str) -> Iterator[T]:
    """``items`` one by one; the bar vanishes with the last, and shows only where stderr is a terminal."""
    console = Console(stderr=True)
    shown = world.rank == 0 and console.is_terminal
    yield from track(items, doing, console=console, transient=True, disable=not shown)
