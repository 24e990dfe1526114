"""Who talks to whom and how tokens travel. Knows no model and no checkpoint."""

from xpar.comm.failure import AgreedError, abort_on_failure, agreed, run
from xpar.comm.grid import ProcessGrid
from xpar.comm.handshake import CollectiveError, DesyncError, RemoteRankError
from xpar.comm.step_agreement import StepFacts, agree_step
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.world import World

__all__ = [
    "AgreedError",
    "CollectiveError",
    "Deadlines",
    "DesyncError",
    "ProcessGrid",
    "RemoteRankError",
    "StepFacts",
    "World",
    "abort_on_failure",
    "agree_step",
    "agreed",
    "run",
]
