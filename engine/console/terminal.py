"""Output for people: the console of rank 0 and, on its stderr, progress bars for long steps."""

from collections.abc import Iterator, Sequence
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, track

from xpar.comm.world import World

T = TypeVar("T")
WIDTH = 130
"""Columns of output that goes to a file or a batch log, which has no width of its own."""


def make_console(world: World) -> Console:
    """Make the console of this rank; only that of rank 0 prints."""
    console = Console(quiet=world.rank != 0, highlight=False)
    return console if console.is_terminal else Console(quiet=console.quiet, highlight=False, width=WIDTH)


def progress(world: World, items: Sequence[T], doing: str) -> Iterator[T]:
    """Yield ``items`` and move a bar on rank 0's stderr, if that is a terminal."""
    console = Console(stderr=True)
    shown = world.rank == 0 and console.is_terminal
    yield from track(items, doing, console=console, transient=True, disable=not shown)


class Meter:
    """A progress bar up to ``total`` (bytes ``in_bytes``) on rank 0's stderr, if a terminal; it vanishes."""

    def __init__(self, world: World, doing: str, total: int, in_bytes: bool = False) -> None:
        console = Console(stderr=True)
        amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            amount,
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=world.rank != 0 or not console.is_terminal,
        )
        self._task = self._bar.add_task(doing, total=total, note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def set_total(self, total: int) -> None:
        """Set the number to count up to, once it is known."""
        self._bar.update(self._task, total=total)

    def advance(self, amount: int) -> None:
        """Count ``amount`` more."""
        self._bar.advance(self._task, amount)

    def show(self, done: int, note: str) -> None:
        """Set the count to ``done`` and print ``note`` beside the bar."""
        self._bar.update(self._task, completed=done, note=note)


def count(number: int, what: str) -> str:
    """Format a number with its noun: ``1 rank``, ``2 ranks``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
