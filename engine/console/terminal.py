"""What people see: rank 0's standard output, and a progress bar on its stderr for steps that take long."""

from collections.abc import Iterator, Sequence
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, track

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


class Meter:
    """A bar on rank 0's stderr that its owner moves; shows only where stderr is a terminal, and vanishes at the end.

    ``total``: what ``advance`` and ``show`` count to. ``in_bytes``: whether that is bytes.
    """

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
        """``total`` is what there is to do, once that is known."""
        self._bar.update(self._task, total=total)

    def advance(self, amount: int) -> None:
        """``amount`` more is done."""
        self._bar.advance(self._task, amount)

    def show(self, done: int, note: str) -> None:
        """``done`` of all is done; ``note`` stands beside it."""
        self._bar.update(self._task, completed=done, note=note)


def count(number: int, what: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
