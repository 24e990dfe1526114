"""A whole model on this job's ranks beside transformers in one process: both from one run, in turn, checked."""

import resource
import statistics
import time
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from xpar.comm.failure import agreed
from xpar.comm.grid import ProcessGrid
from xpar.engine.bench.decode_profile import Decoded, decode, prompts, where_time_goes
from xpar.engine.bench.decoding_peer import IMPLEMENTATIONS, DecodingPeer
from xpar.engine.bench.timing import SETTLE_S
from xpar.engine.layer.reference import relative_error
from xpar.engine.models.loader import LoadedModel
from xpar.kernels.cpu import zen_library

LEAST_TOKENS = 3
"""That show a step that continues."""
FAR = 2.0
"""Times as long as the fastest: that is no contender."""


@dataclass(frozen=True)
class Run:
    """``batch``: sequences of the whole job. ``rounds``: how often each side runs, in turn; one before is not counted."""

    batch: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    seed: int


def measure(grid: ProcessGrid, loaded: LoadedModel, peer: DecodingPeer | None, run: Run) -> dict[str, Any]:
    """Both sides' figures on ``run``, the same on every rank; ``peer``: on rank 0. Collective."""
    comm = grid.world.comm
    ids = prompts(run.batch, run.prompt_tokens, loaded.model.config.get_text_config().vocab_size, run.seed)
    ours: list[Decoded] = []
    theirs: dict[str, list[Decoded]] = {name: [] for name in IMPLEMENTATIONS}
    for turn in range(run.rounds + 1):
        ours.append(decode(comm, loaded, ids, run.new_tokens))
        for name, decoded in theirs.items():
            # The first round only tells which are contenders.
            asking = partial(_ask, peer, name, ids, run.new_tokens if turn else LEAST_TOKENS)
            decoded += agreed(comm, asking, "bench generate", patient=True)
        if turn == 0:
            theirs = {name: theirs[name] for name in comm.all_gather_object(_fast(theirs))[0]}
    parts = where_time_goes(comm, loaded, ids, run.new_tokens)
    record = _compare(run, ours[1:], {n: d[1:] for n, d in theirs.items()}) if peer else {}
    told: dict[str, Any] = comm.all_gather_object(record | {"step_parts_ms": parts})[0]
    return told


def peak_bytes(grid: ProcessGrid) -> list[int]:
    """The most memory that each rank had at any time; collective."""
    return grid.world.comm.all_gather_object(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def resident_bytes(grid: ProcessGrid, path: Path) -> list[int]:
    """What each rank has in memory now, all code that the model of ``path`` brings among it; collective.

    Where the system does not tell (outside of Linux), the most that it had.
    """
    agreed(grid.world.comm, lambda: _bring_code(path))
    try:
        now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_bytes(grid)
    return grid.world.comm.all_gather_object(now)


def _bring_code(path: Path) -> None:
    if find_spec("transformers"):
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    if zen_library.why_unavailable() is None:
        zen_library.load_operators()


@dataclass(frozen=True)
class LoadingMemory:
    """Of one rank, in bytes: resident before it loads, its peak after, and the weights that it then holds."""

    before: int
    peak: int
    weights: int

    @property
    def beyond(self) -> float:
        """What loading took at its peak beyond the weights, as a fraction of them."""
        return (self.peak - self.before) / self.weights - 1


def loading_memory(grid: ProcessGrid, loaded: LoadedModel, before: list[int]) -> list[LoadingMemory]:
    """Of every rank, right after loading; ``before``: of :func:`resident_bytes`. Collective."""
    weights = grid.world.comm.all_gather_object(loaded.dense_bytes + loaded.expert_bytes)
    return [LoadingMemory(*m) for m in zip(before, peak_bytes(grid), weights, strict=True)]


def start_peer(grid: ProcessGrid, path: Path, dtype: torch.dtype) -> DecodingPeer | None:
    """On rank 0; the others sleep until it has its model. Collective; raises one error on every rank."""
    world = grid.world

    def start() -> DecodingPeer | None:
        if world.rank:
            return None
        return DecodingPeer(path, dtype, world.threads() * world.local_size, grid.device)

    return agreed(world.comm, start, "bench generate", patient=True)


def _ask(peer: DecodingPeer | None, name: str, ids: torch.Tensor, new_tokens: int) -> list[Decoded]:
    if peer is None:
        return []
    time.sleep(SETTLE_S)
    prefill_s, steps, tokens, logits = peer.decode(name, ids, new_tokens)
    return [Decoded(prefill_s, statistics.median(steps) * 1e3, tokens, logits)]


def _fast(theirs: dict[str, list[Decoded]]) -> list[str]:
    """Those that may still turn out to be the best: the others' rounds would take most of the time."""
    step_ms = {name: decoded[0].step_ms for name, decoded in theirs.items() if decoded}
    return [name for name, ms in step_ms.items() if ms < FAR * min(step_ms.values())]


def _compare(run: Run, ours: list[Decoded], theirs: dict[str, list[Decoded]]) -> dict[str, Any]:
    """Medians over the rounds; the best of transformers' implementations at this batch is what we are compared with."""
    step_ms = {name: statistics.median(d.step_ms for d in decoded) for name, decoded in theirs.items()}
    best = min(step_ms, key=lambda name: step_ms[name])
    mine = statistics.median(d.step_ms for d in ours)
    # Round by round, so that slow moments of the machine cancel.
    ratio = statistics.median(t.step_ms / o.step_ms for t, o in zip(theirs[best], ours, strict=True))
    same = sum(a == b for a, b in zip(ours[0].tokens, theirs[best][0].tokens, strict=True))
    return {
        "batch": run.batch,
        "step_ms": {"xpar": mine} | step_ms,
        "tokens_per_s": {n: run.batch / ms * 1e3 for n, ms in ({"xpar": mine} | step_ms).items()},
        "prefill_s": {
            "xpar": statistics.median(d.prefill_s for d in ours),
            best: statistics.median(d.prefill_s for d in theirs[best]),
        },
        "best": best,
        "ratio": ratio,
        "logits_rel_error": relative_error(ours[0].logits, theirs[best][0].logits),
        "same_text": same,
    }
