"""The deadlines of everything that needs other ranks."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Deadlines:
    """The seconds for which one rank of a group may keep the others waiting.

    Patient waits, for a rank that works alone, have no deadline.

    Attributes:
        connect: Making a new communicator on GPUs.
        launch: Until an operation on a GPU has started.
        finish: Until an operation on a GPU is done.
        abort: Giving up an operation on a GPU.
        start: A collective while the job is set up or a layer takes its first steps, in which kernels are
            compiled and files are read.
        step: A collective of a later step.
    """

    connect: float = 120.0
    launch: float = 120.0
    finish: float = 600.0
    abort: float = 5.0
    start: float = 300.0
    step: float = 60.0

    @classmethod
    def of_step(cls, seconds: float) -> "Deadlines":
        """Set ``step`` to ``seconds``, positive and finite, and scale the others but ``abort`` alike."""
        if not (seconds > 0 and math.isfinite(seconds)):
            raise ValueError(f"deadline of {seconds:g} s: must be positive and finite; leave it out for 60 s")
        scale = seconds / cls.step
        return cls(
            cls.connect * scale, cls.launch * scale, cls.finish * scale, cls.abort, cls.start * scale, seconds
        )
