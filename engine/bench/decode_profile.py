"""Decoding with the loop of ``xpar generate``, and the time of each part of a step."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from xpar.comm.communicator import Communicator
from xpar.engine.generation.answer_form import Result
from xpar.engine.generation.choose_batch import choose_batch
from xpar.engine.generation.flat_batch import FlatBatch
from xpar.engine.generation.kv_memory import BatchRoom
from xpar.engine.generation.lockstep import LockstepCallbacks, Progress, run_lockstep
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.layer.stage_timer import MeasuringTimer
from xpar.engine.models.lm_head import find_head
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.model_layer import timed

PARTS = ("attention", "router", "experts", "communication", "head", "agreement", "rest")
"""The parts of a step. ``agreement``: the exchange before the step. ``rest``: norms, caches, sampling,
Python."""


@dataclass(frozen=True)
class Decoded:
    """The result of one decoding.

    ``prefill_s``: seconds of the step that reads the prompts. ``step_ms``: median of the steps that follow,
    each of one token per sequence. ``tokens``: [B][new tokens]. ``logits``: [B, V] float32 behind the
    prompts.
    """

    prefill_s: float
    step_ms: float
    tokens: list[list[int]]
    logits: Tensor


@dataclass(frozen=True)
class RecordedSampling(Sampling):
    """Greedy sampling that keeps the first logits that it gets, in ``seen``."""

    seen: list[Tensor] = field(default_factory=list)

    def choose(self, logits: Tensor, generators: Any) -> list[int]:
        if not self.seen:
            self.seen.append(logits.float().cpu())
        return super().choose(logits, generators)


def draw_prompts(batch: int, length: int, vocab: int, seed: int) -> Tensor:
    """Draw prompts [B, P] int64, the same in every process."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed + batch))


def decode(
    comm: Communicator,
    loaded: LoadedModel,
    ids: Tensor,
    new_tokens: int,
    on_agreement: Callable[[float], None] = lambda seconds: None,
    captured: bool = True,
) -> Decoded:
    """Continue prompts ``ids`` [B, P] int64 greedily; collective.

    ``on_agreement`` is called with the seconds of the agreement before each step. ``captured``: replay steps
    as CUDA graphs where ``xpar generate`` does so; otherwise launch each part of each step.
    """
    sampling = RecordedSampling()
    step_begins: list[float] = []
    polled = [0.0]
    results: list[Result] = []

    def stop() -> bool:
        polled[0] = time.perf_counter()
        return False

    most_rows = -(-len(ids) // comm.size)
    room = BatchRoom(most_rows, ids.numel(), lengths=[ids.shape[1] + new_tokens] * len(ids))
    batch = choose_batch(loaded, sampling, StopConditions(new_tokens), records=captured, room=room)
    # A flat batch is dealt its prompts in a step of its own, in which nothing is computed.
    deals = [isinstance(batch, FlatBatch)]

    def report_progress(_: Progress) -> None:
        if deals[0]:
            deals[0] = False
            return
        step_begins.append(time.perf_counter())
        on_agreement(step_begins[-1] - polled[0])

    job = LockstepCallbacks(
        total=len(ids),
        start=lambda place: RunningSequence(place, ids[place].tolist(), torch.Generator()),
        length=lambda place: ids.shape[1],
        at_once=lambda place: len(ids),
        make_result=lambda r: {"place": r.place, "tokens": r.answer},
        write=results.extend,
        stop=stop,
        report_progress=report_progress,
    )
    comm.barrier()
    run_lockstep(comm, batch, most_rows, job)
    steps = [after - before for before, after in pairwise(step_begins)]
    logits = [part for parts in comm.all_gather_object(sampling.seen) for part in parts]
    tokens = [r["tokens"] for r in sorted(results, key=lambda r: int(r["place"]))]
    return Decoded(steps[0], statistics.median(steps[1:]) * 1e3, tokens, torch.cat(logits))


def measure_parts(comm: Communicator, loaded: LoadedModel, ids: Tensor, new_tokens: int) -> dict[str, float]:
    """Measure the mean milliseconds of each of ``PARTS`` in a step on this rank; collective.

    A replayed CUDA graph has no parts, so that every step is launched. ``ids``: prompts [B, P] int64.
    """
    timer, agreement = MeasuringTimer(loaded.device), [0.0]
    with timed_parts(loaded, timer) as hooked:

        def on_agreement(seconds: float) -> None:
            agreement.append(seconds)
            if len(agreement) == 3:  # the prompts have been read: their step is not counted
                for seconds_of in (timer.seconds, hooked):
                    seconds_of.update(dict.fromkeys(seconds_of, 0.0))
                begin.append(time.perf_counter())

        begin: list[float] = []
        decode(comm, loaded, ids, new_tokens, on_agreement, captured=False)
        whole = time.perf_counter() - begin[0]
    spent = timer.read().seconds
    steps = new_tokens - 1
    parts = {
        "attention": hooked["attention"],
        "router": hooked["router"] + spent["route"],
        "experts": spent["compute"] + spent["shared"],
        "communication": spent["plan"] + spent["dispatch"] + spent["combine"] + spent["finish"],
        "head": hooked["head"],
        "agreement": sum(agreement[3:]),
    }
    parts["rest"] = whole - sum(parts.values())
    return {name: parts[name] / steps * 1e3 for name in PARTS}


@contextmanager
def timed_parts(loaded: LoadedModel, timer: MeasuringTimer) -> Iterator[dict[str, float]]:
    """Measure a model in the context: yields the seconds of attention, router and head.

    ``timer`` gets the stages of the expert layers.
    """
    seconds = {"attention": 0.0, "router": 0.0, "head": 0.0}
    handles = []
    for module, part in _find_modules(loaded.model):
        begin = [0.0]

        def before(*_: object, begin: list[float] = begin) -> None:
            begin[0] = time.perf_counter()

        def after(*_: object, begin: list[float] = begin, part: str = part) -> None:
            seconds[part] += time.perf_counter() - begin[0]

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with timed(loaded.layers, timer):
            yield seconds
    finally:
        for handle in handles:
            handle.remove()


def _find_modules(model: Any) -> Iterator[tuple[torch.nn.Module, str]]:
    """Yield the modules that are timed, each with its part of a step."""
    yield find_head(model), "head"
    for _, module in model.named_modules():
        if type(module).__name__.endswith("Attention"):
            yield module, "attention"
        elif type(module).__name__.endswith("Router"):
            yield module, "router"
