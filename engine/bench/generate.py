"""Decoding with a whole model on this job's ranks, beside transformers in one process."""

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
from xpar.engine.bench.decode_profile import Decoded, decode, draw_prompts, measure_parts
from xpar.engine.bench.peer_process import DecodingPeer
from xpar.engine.bench.peers import DECODE_IMPLEMENTATIONS
from xpar.engine.bench.timing import SETTLE_S
from xpar.engine.layer.reference import relative_error
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.malloc import peak_bytes, resident_bytes
from xpar.kernels.cpu import zen_library

LEAST_TOKENS = 3
"""Fewest new tokens with which a step that continues sequences can be measured."""
FAR = 2.0
"""An implementation that takes this many times as long as the fastest is no contender."""


@dataclass(frozen=True)
class DecodeRequest:
    """The sequences to decode and how.

    ``batch``: number of sequences of the whole job. ``rounds``: how often each side runs, in turn, after one
    round that is not counted. ``seed``: of the prompts.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    seed: int


def measure(
    grid: ProcessGrid,
    loaded: LoadedModel,
    peer: DecodingPeer | None,
    request: DecodeRequest,
    floats: LoadedModel | None = None,
) -> dict[str, Any]:
    """Decode on both sides in turn and compare them; collective, with the same figures on all.

    ``peer``: transformers' process, on rank 0; None on the other ranks. ``floats``: the same model with
    weights in floats, which is then the other side, as ``bf16``.
    """
    if floats is not None:
        return _measure_beside(grid, loaded, floats, request)
    comm, new_tokens = grid.world.comm, request.new_tokens
    vocab = loaded.model.config.get_text_config().vocab_size
    ids = draw_prompts(request.batch, request.prompt_tokens, vocab, request.seed)
    ours: list[Decoded] = []
    theirs: dict[str, list[Decoded]] = {name: [] for name in DECODE_IMPLEMENTATIONS}
    for turn in range(request.rounds + 1):
        ours.append(decode(comm, loaded, ids, new_tokens))
        for name, decoded in theirs.items():
            # The first round only finds out which implementations are contenders.
            ask = partial(_ask_peer, peer, name, ids, new_tokens if turn else LEAST_TOKENS)
            decoded += agreed(comm, ask, "bench generate", patient=True)
        if turn == 0:
            theirs = {name: theirs[name] for name in comm.all_gather_object(_find_contenders(theirs))[0]}
    parts = measure_parts(comm, loaded, ids, new_tokens)
    result = _compare(request, ours[1:], {n: d[1:] for n, d in theirs.items()}) if peer else {}
    complete: dict[str, Any] = comm.all_gather_object(result | {"step_parts_ms": parts})[0]
    return complete


def _measure_beside(
    grid: ProcessGrid, loaded: LoadedModel, floats: LoadedModel, request: DecodeRequest
) -> dict[str, Any]:
    """Decode with both models of these ranks in turn; collective."""
    comm, vocab = grid.world.comm, loaded.model.config.get_text_config().vocab_size
    ids = draw_prompts(request.batch, request.prompt_tokens, vocab, request.seed)
    sides: dict[str, list[Decoded]] = {"xpar": [], "bf16": []}
    for _ in range(request.rounds + 1):
        for name, model in (("xpar", loaded), ("bf16", floats)):
            sides[name].append(decode(comm, model, ids, request.new_tokens))
    parts = measure_parts(comm, loaded, ids, request.new_tokens)
    result = _compare(request, sides["xpar"][1:], {"bf16": sides["bf16"][1:]}) if not comm.rank else {}
    complete: dict[str, Any] = comm.all_gather_object(result | {"step_parts_ms": parts})[0]
    return complete


def gather_peak_bytes(grid: ProcessGrid) -> list[int]:
    """Return the most memory in bytes that each rank had at any time; collective."""
    return grid.world.comm.all_gather_object(peak_bytes())


def gather_resident_bytes(grid: ProcessGrid, path: Path) -> list[int]:
    """Return the bytes of memory that each rank has now; collective.

    The code that the model of ``path`` needs is imported first, so that its memory is not taken for weights.

    On a system that does not tell (outside of Linux), the result is the peak.
    """
    agreed(grid.world.comm, lambda: _import_code(path))
    return grid.world.comm.all_gather_object(resident_bytes())


def _import_code(path: Path) -> None:
    """Import everything that loading the model of ``path`` would import."""
    if find_spec("transformers"):
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    if zen_library.why_unavailable() is None:
        zen_library.load_operators()


@dataclass(frozen=True)
class LoadingMemory:
    """The bytes of memory of one rank: before it loads, its peak after, and its weights."""

    before: int
    peak: int
    weights: int

    @property
    def beyond(self) -> float:
        """The memory that loading took at its peak beyond the weights, as a fraction of the weights."""
        return (self.peak - self.before) / self.weights - 1


def gather_loading_memory(grid: ProcessGrid, loaded: LoadedModel, before: list[int]) -> list[LoadingMemory]:
    """Return the memory of every rank right after loading, beside that ``before`` it; collective."""
    weights = grid.world.comm.all_gather_object(loaded.dense_bytes + loaded.expert_bytes)
    return [LoadingMemory(*m) for m in zip(before, gather_peak_bytes(grid), weights, strict=True)]


def start_peer(grid: ProcessGrid, path: Path, dtype: torch.dtype) -> DecodingPeer | None:
    """Start transformers' process on rank 0 while the others, which get None, sleep; collective."""
    world = grid.world

    def start() -> DecodingPeer | None:
        if world.rank:
            return None
        return DecodingPeer(path, dtype, world.threads() * world.local_size, grid.device)

    return agreed(world.comm, start, "bench generate", patient=True)


def _ask_peer(peer: DecodingPeer | None, name: str, ids: torch.Tensor, new_tokens: int) -> list[Decoded]:
    if peer is None:
        return []
    time.sleep(SETTLE_S)
    prefill_s, steps, tokens, logits = peer.decode(name, ids, new_tokens)
    return [Decoded(prefill_s, statistics.median(steps) * 1e3, tokens, logits)]


def _find_contenders(theirs: dict[str, list[Decoded]]) -> list[str]:
    """Return the implementations that may still be fastest; rounds of others would take long."""
    step_ms = {name: decoded[0].step_ms for name, decoded in theirs.items() if decoded}
    return [name for name, ms in step_ms.items() if ms < FAR * min(step_ms.values())]


def _compare(request: DecodeRequest, ours: list[Decoded], theirs: dict[str, list[Decoded]]) -> dict[str, Any]:
    """Compare medians over the rounds with the fastest of transformers' implementations."""
    step_ms = {name: statistics.median(d.step_ms for d in decoded) for name, decoded in theirs.items()}
    best = min(step_ms, key=lambda name: step_ms[name])
    mine = statistics.median(d.step_ms for d in ours)
    # Round by round, so that slow moments of the machine cancel.
    ratio = statistics.median(t.step_ms / o.step_ms for t, o in zip(theirs[best], ours, strict=True))
    same = sum(a == b for a, b in zip(ours[0].tokens, theirs[best][0].tokens, strict=True))
    return {
        "batch": request.batch,
        "step_ms": {"xpar": mine} | step_ms,
        "tokens_per_s": {n: request.batch / ms * 1e3 for n, ms in ({"xpar": mine} | step_ms).items()},
        "prefill_s": {
            "xpar": statistics.median(d.prefill_s for d in ours),
            best: statistics.median(d.prefill_s for d in theirs[best]),
        },
        "best": best,
        "ratio": ratio,
        "logits_rel_error": relative_error(ours[0].logits, theirs[best][0].logits),
        "same_text": same,
    }
