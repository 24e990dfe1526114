"""How long anything that needs other ranks may take."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Deadlines:
    """Seconds, in which a rank of a group may keep the others waiting.

    ``start``: a collective while the job is set up or a layer takes its first step, in which kernels are compiled and
    files are read. ``step``: one of a later step. Work that is queued on a GPU has more: ``connect`` for a new
    communicator there, ``launch`` until an operation has started, ``finish`` until it is done, ``abort`` for giving one
    up. Patient waits, for a rank that works alone, have none.
    """

    connect: float = 120.0
    launch: float = 120.0
    finish: float = 600.0
    abort: float = 5.0
    start: float = 300.0
    step: float = 60.0

    @classmethod
    def of_step(cls, seconds: float) -> "Deadlines":
        """``step`` as given, the others in proportion to their defaults; ValueError unless positive and finite."""
        if not (seconds > 0 and math.isfinite(seconds)):
            raise ValueError(f"deadline of {seconds:g} s: must be positive and finite; leave it out for 60 s")
        scale = seconds / cls.step
        return cls(
            cls.connect * scale, cls.launch * scale, cls.finish * scale, cls.abort, cls.start * scale, seconds
        )
