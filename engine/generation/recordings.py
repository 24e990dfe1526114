"""What every recording of a step needs: whether a model allows it, the attempt of all ranks, the deadline."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.parallelize import Layer

log = logging.getLogger("xpar.models")
BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
BUCKET_STEP = 32
"""Rows between two buckets beyond the last of ``BUCKETS``, up to 256; from there on four to a doubling."""
PATIENCE = 8
"""Steps for which a recording has to be wanted, which takes as long as about five of them."""
T = TypeVar("T")


def bucket_of(sequences: int) -> int:
    """Return the rows of a recording for up to ``sequences`` sequences a rank."""
    fitting = next((bucket for bucket in BUCKETS if sequences <= bucket), None)
    if fitting:
        return fitting
    step = max(BUCKET_STEP, 1 << (sequences - 1).bit_length() - 3)
    return -(-sequences // step) * step


def is_recordable(loaded: LoadedModel) -> bool:
    """Return whether steps of ``loaded`` can be recorded.

    Not on host processors, for a model that norms the outputs of slots, and with layers that wait for the
    host in a step: in exact mode, and with rows of several ranks that neither NCCL gathers nor kernels store
    in the peers' memory.
    """
    if loaded.device.type != "cuda" or not loaded.sends_tokens_once:
        return False
    return all(map(_is_recordable, loaded.layers))


def attempt_on_all(loaded: LoadedModel, record: Callable[[], T], alone: bool) -> tuple[T | None, str | None]:
    """Let every rank record; return the recording, or None and the reason where one of them failed.

    Collective, unless this rank is ``alone``.
    """
    found, problem = None, None
    try:
        with _watch_paused(loaded):
            found = record()
    except RuntimeError as error:
        problem = str(error).splitlines()[0]
    problems: list[str | None] = [problem]
    if not alone and loaded.layers:
        problems = list(loaded.layers[0].runner.grid.world.comm.all_gather_object(problem))
    if not any(problems):
        return found, None
    refused = next(
        text if len(problems) == 1 else f"rank {rank}: {text}" for rank, text in enumerate(problems) if text
    )
    log.info("steps are not recorded: %s", refused)
    return None, refused


def follow_replay(loaded: LoadedModel) -> None:
    """Give a replay a deadline where it waits for peers in NCCL; one-sided kernels have their own."""
    runner = loaded.layers[0].runner if loaded.layers else None
    if runner is None or runner.grid.transport is None:
        return
    if runner.dispatcher.capabilities.needs_transport and runner.grid.world.size > 1:
        runner.grid.transport.follow("a recorded step")


def _is_recordable(layer: Layer) -> bool:
    runner = layer.runner
    can, transport = runner.dispatcher.capabilities, runner.grid.transport
    if can.takes_slots or runner.options.exact:
        return can.takes_slots
    if runner.grid.world.size == 1:
        return True
    return can.graph_capture and transport is not None and transport.choice.name == "nccl"


def _watch_paused(loaded: LoadedModel) -> AbstractContextManager[object]:
    """The transport's watching thread must not ask about events while this one records."""
    transport = loaded.layers[0].runner.grid.transport if loaded.layers else None
    return nullcontext() if transport is None or transport.watch is None else transport.watch.paused()
