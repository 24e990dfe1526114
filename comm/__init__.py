"""The ranks of a job: world, process grid, collectives, token dispatch, failures.

This room knows no model and no checkpoint. ``dispatch`` moves tokens to their experts, ``device`` moves GPU
tensors, ``watchdog`` enforces deadlines and reports. Letters in shapes: T tokens of this rank, H hidden size,
E experts, k experts per token, R ranks of a group.
"""

from xpar.comm.column_parallel import ColumnParallel, ColumnSlice, split_columns
from xpar.comm.communicator import Communicator, Pending, SoloCommunicator, Tag
from xpar.comm.dispatch.base import Capabilities, Dispatcher, DispatchPlan, DispatchRequest, Traffic
from xpar.comm.dispatch.choose import DISPATCHERS, DispatcherChoice, choose_dispatcher
from xpar.comm.failure import AgreedError, abort_on_failure, agreed, run
from xpar.comm.grid import GridShape, ProcessGrid
from xpar.comm.handshake import CollectiveError, DesyncError, RemoteRankError, handshake
from xpar.comm.placement import Placement
from xpar.comm.reduction import Distributed, Full, Partial, Sharded, split_tokens, sum_outputs, to_full
from xpar.comm.step_agreement import StepFacts, agree_step
from xpar.comm.stragglers import Lateness, gather_lateness
from xpar.comm.watchdog.deadlines import Deadlines
from xpar.comm.watchdog.watchdog import WatchdogOptions
from xpar.comm.world import LaunchError, World

__all__ = [
    "DISPATCHERS",
    "AgreedError",
    "Capabilities",
    "CollectiveError",
    "ColumnParallel",
    "ColumnSlice",
    "Communicator",
    "Deadlines",
    "DesyncError",
    "DispatchPlan",
    "DispatchRequest",
    "Dispatcher",
    "DispatcherChoice",
    "Distributed",
    "Full",
    "GridShape",
    "Lateness",
    "LaunchError",
    "Partial",
    "Pending",
    "Placement",
    "ProcessGrid",
    "RemoteRankError",
    "Sharded",
    "SoloCommunicator",
    "StepFacts",
    "Tag",
    "Traffic",
    "WatchdogOptions",
    "World",
    "abort_on_failure",
    "agree_step",
    "agreed",
    "choose_dispatcher",
    "gather_lateness",
    "handshake",
    "run",
    "split_columns",
    "split_tokens",
    "sum_outputs",
    "to_full",
]
