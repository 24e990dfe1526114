"""Fair timing of several contenders on one GPU: short bursts in turn, with the card's clock and power noted.

A card at its power limit lowers its clock by up to a third, and what runs first, on a cool card, looks up to
12 % faster than it is (H200). So all contenders are recorded first, and then replayed in turn.
"""

import statistics
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Turns:
    """The seconds per call of every contender, one number a round.

    Attributes:
        seconds: the times of each contender, by its name.
        card: the card during the last round, None if that could not be read.
    """

    seconds: Mapping[str, tuple[float, ...]]
    card: "Card | None" = None

    def median(self, name: str) -> float:
        """Return the median seconds of a call."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """Return how many times as long as ``base`` a contender takes: a median over rounds."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(its / ours for its, ours in pairs)

    def fastest(self, besides: tuple[str, ...]) -> str | None:
        """Return the contender with the least median, apart from those named; None without any."""
        others = [name for name in self.seconds if name not in besides]
        return min(others, key=self.median, default=None)


@dataclass(frozen=True)
class Card:
    """The state of a GPU: ``mhz``, the clock of its multiprocessors, and ``watts``."""

    mhz: float
    watts: float


def take_bursts(
    bursts: Mapping[str, Callable[[], float]],
    rounds: int,
    read_card: "Callable[[], Callable[[], Card | None]] | None" = None,
) -> Turns:
    """Run every contender once per round, each round beginning with another one.

    Args:
        bursts: for each contender, a call that runs it for a few milliseconds and returns the seconds per
            call.
        rounds: number of rounds after one that is not counted.
        read_card: a call that begins to read the card and returns what waits for the answer; it is called
            before the last round. None: the card is not read.
    """
    names = list(bursts)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    finish: Callable[[], Card | None] | None = None
    for turn in range(-1, rounds):
        if turn == rounds - 1 and read_card is not None:
            finish = read_card()
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            taken = bursts[name]()
            if turn >= 0:
                seconds[name].append(taken)
    return Turns({name: tuple(times) for name, times in seconds.items()}, finish() if finish else None)


def start_reading_card() -> Callable[[], Card | None]:
    """Begin to read clock and power of the current GPU, and return what waits for them."""
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    words = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.Popen(
            [*words, f"--id=GPU-{uuid}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return lambda: None

    def finish() -> Card | None:
        try:
            said, _ = process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return None
        return parse_card(said)

    return finish


def parse_card(said: str) -> Card | None:
    """Parse a line such as ``1980, 450.12`` of nvidia-smi; None for anything else."""
    try:
        mhz, watts = map(float, said.strip().split(","))
    except ValueError:
        return None
    return Card(mhz, watts)
