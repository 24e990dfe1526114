"""What ``xpar bench generate`` runs on this job's ranks: the loop of ``xpar generate`` on prompts of one length.

B sequences of the whole job, P tokens of a prompt, V vocabulary.
"""

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
from xpar.engine.generation.decode_batch import DecodeBatch, RunningSequence, StopConditions
from xpar.engine.generation.lockstep import LockstepCallbacks, Progress, Record, run_lockstep
from xpar.engine.generation.recorder import DecodeGraph
from xpar.engine.generation.sampling import Sampling
from xpar.engine.layer.stage_timer import MeasuringTimer
from xpar.engine.models.loader import LoadedModel
from xpar.engine.models.model_layer import timed

PARTS = ("attention", "router", "experts", "communication", "head", "agreement", "rest")
"""Of a step. ``agreement``: the exchange before it. ``rest``: norms, caches, sampling, Python."""


@dataclass(frozen=True)
class Decoded:
    """``prefill_s``: of the step that reads the prompts. ``step_ms``: median of those that follow, a token each.

    ``tokens`` [B][new tokens]; ``logits`` [B, V] float32 behind the prompts.
    """

    prefill_s: float
    step_ms: float
    tokens: list[list[int]]
    logits: Tensor


@dataclass(frozen=True)
class RecordedSampling(Sampling):
    """Greedy, and remembers the first logits that it sees."""

    seen: list[Tensor] = field(default_factory=list)

    def choose(self, logits: Tensor, generators: Any) -> list[int]:
        if not self.seen:
            self.seen.append(logits.float().cpu())
        return super().choose(logits, generators)


def prompts(batch: int, length: int, vocab: int, seed: int) -> Tensor:
    """[B, P] int64, the same in every process."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed + batch))


def decode(
    comm: Communicator,
    loaded: LoadedModel,
    ids: Tensor,
    new_tokens: int,
    agreeing: Callable[[float], None] = lambda seconds: None,
    recorded: bool = True,
) -> Decoded:
    """Answer prompts ``ids`` [B, P] with ``new_tokens`` tokens each; collective. ``agreeing`` hears each agreement's seconds.

    ``recorded``: replay steps as ``xpar generate`` does, where it does; else launch each part of each.
    """
    sampling = RecordedSampling()
    told: list[float] = []
    asked = [0.0]
    records: list[Record] = []

    def stop() -> bool:
        asked[0] = time.perf_counter()
        return False

    def tell(_: Progress) -> None:
        told.append(time.perf_counter())
        agreeing(told[-1] - asked[0])

    job = LockstepCallbacks(
        total=len(ids),
        start=lambda place: RunningSequence(place, ids[place].tolist(), torch.Generator()),
        at_once=lambda place: len(ids),
        record=lambda r: {"place": r.place, "tokens": r.answer},
        write=records.extend,
        stop=stop,
        tell=tell,
    )
    comm.barrier()
    recorder = DecodeGraph.of(loaded) if recorded else None
    sequences = DecodeBatch(loaded, sampling, StopConditions(new_tokens), recorder)
    run_lockstep(comm, sequences, -(-len(ids) // comm.size), job)
    steps = [after - before for before, after in pairwise(told)]
    logits = [part for parts in comm.all_gather_object(sampling.seen) for part in parts]
    tokens = [r["tokens"] for r in sorted(records, key=lambda r: int(r["place"]))]
    return Decoded(steps[0], statistics.median(steps[1:]) * 1e3, tokens, torch.cat(logits))


def where_time_goes(
    comm: Communicator, loaded: LoadedModel, ids: Tensor, new_tokens: int
) -> dict[str, float]:
    """Milliseconds of each of ``PARTS`` in a step that continues sequences, on rank 0, mean over the steps.

    A replayed step has no parts: these are of steps that are launched.
    """
    clock, agreement = MeasuringTimer(loaded.layers[0].runner.grid.device), [0.0]
    with _timed(loaded, clock) as hooked:

        def agreeing(seconds: float) -> None:
            agreement.append(seconds)
            if len(agreement) == 3:  # the prompts have been read: their step is not counted
                for seconds_of in (clock.seconds, hooked):
                    seconds_of.update(dict.fromkeys(seconds_of, 0.0))
                begin.append(time.perf_counter())

        begin: list[float] = []
        decode(comm, loaded, ids, new_tokens, agreeing, recorded=False)
        whole = time.perf_counter() - begin[0]
    spent = clock.read().seconds
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
def _timed(loaded: LoadedModel, clock: MeasuringTimer) -> Iterator[dict[str, float]]:
    """Seconds of attention, router and head, which the model's own modules compute; ``clock`` gets the layers' stages."""
    seconds = {"attention": 0.0, "router": 0.0, "head": 0.0}
    handles = []
    for module, part in _modules(loaded.model):
        begin = [0.0]

        def before(*_: object, begin: list[float] = begin) -> None:
            begin[0] = time.perf_counter()

        def after(*_: object, begin: list[float] = begin, part: str = part) -> None:
            seconds[part] += time.perf_counter() - begin[0]

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with timed(loaded.layers, clock):
            yield seconds
    finally:
        for handle in handles:
            handle.remove()


def _modules(model: Any) -> Iterator[tuple[torch.nn.Module, str]]:
    yield model.get_output_embeddings(), "head"
    for _, module in model.named_modules():
        if type(module).__name__.endswith("Attention"):
            yield module, "attention"
        elif type(module).__name__.endswith("Router"):
            yield module, "router"
