"""Recorded steps on several ranks, whose sequences differ in number, give what launched steps give.

A CUDA graph replays what is called here; ``tests/gpu/check_generate.py`` compares those, on GPUs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from moe_families import Case
from tiny_models import BYTES, write_model
from torch import Tensor

from xpar.comm import ProcessGrid, World
from xpar.comm.dispatch import base
from xpar.engine.generation import recorder as decode_recorder
from xpar.engine.generation.decode_batch import DecodeBatch
from xpar.engine.generation.decode_graph import FixedStep
from xpar.engine.generation.flat_batch import FlatBatch, FlatLimits
from xpar.engine.generation.flat_recorder import FlatRecorder
from xpar.engine.generation.lockstep import LockstepCallbacks, run_lockstep
from xpar.engine.generation.recorder import DecodeGraph
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.models.flat_forward import flat_forms
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.loader import load_model
from xpar.engine.models.model_layer import padded
from xpar.engine.models.parallelize import SpreadOptions
from xpar.engine.models.span_pool import SpanPool
from xpar.kernels.gpu.span_attention import SpanAttention

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=120)
PROMPTS, BATCH = 9, 3
CASES = {"olmoe": False, "qwen2_moe": False, "deepseek_v3": True}
"""Families, and whether the whole block is xpar's."""


@dataclass(frozen=True)
class Forced(Sampling):
    """Takes tokens that depend on place and step alone, and keeps the logits of each."""

    seen: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def choose(self, logits: Tensor, generators: Any) -> list[int]:
        tokens = []
        for row, generator in zip(logits, generators, strict=True):
            place = generator.initial_seed()
            step = sum(1 for known, _ in self.seen if known == place)
            self.seen[place, step] = row.clone()
            tokens.append((7 * place + 3 * step) % BYTES)
        return tokens


class StandIn:
    """Calls what a graph would replay, after a rehearsal that must leave no trace."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.counted = [layer.slot_counter.counted for layer in loaded.layers]
        self.layers = loaded.layers

    def rehearse(self, forward: Callable[[], object]) -> None:
        before = [number.clone() for number in self.counted]
        forward()
        for number, value in zip(self.counted, before, strict=True):
            number.copy_(value)

    def record(self, step: FixedStep) -> Callable[[], Tensor]:
        self.rehearse(step.forward)
        step.rewind()
        return step.forward

    def join(self, rows: int) -> Callable[[], None]:
        padding = torch.ones(rows, dtype=torch.bool)

        def take_part() -> None:
            with padded(self.layers, padding):
                for layer in self.layers:
                    layer.join(rows)

        self.rehearse(take_part)
        return take_part


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


def answer(
    world: World, loaded: LoadedModel, seed: int, make: Callable[[Sampling], Any]
) -> tuple[dict[tuple[int, int], Tensor], int]:
    """Logits by prompt and step, of all ranks; and the (token, expert) pairs that this rank computed.

    ``make``: makes the batch that draws as it is told.
    """
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (PROMPTS,), generator=draw).tolist()
    wanted = torch.randint(2, 14, (PROMPTS,), generator=draw).tolist()
    sampling, before = Forced(), loaded.slots()

    def start(place: int) -> RunningSequence:
        ids = [(place + n) % BYTES for n in range(lengths[place])]
        generator = torch.Generator().manual_seed(place)
        return RunningSequence(place, ids, generator, stopped=lambda answer: len(answer) >= wanted[place])

    job = LockstepCallbacks(
        total=PROMPTS,
        start=start,
        length=lambda place: lengths[place],
        at_once=lambda place: BATCH,
        make_result=lambda r: {"place": r.place},
        write=lambda results: None,
        stop=lambda: False,
        report_progress=lambda progress: None,
    )
    assert run_lockstep(world.comm, make(sampling), BATCH, job)
    seen: dict[tuple[int, int], Tensor] = {}
    for part in world.comm.all_gather_object(sampling.seen):
        seen |= part
    return seen, loaded.slots() - before


def padded_batch(loaded: LoadedModel, graph: DecodeGraph | None) -> Callable[[Sampling], DecodeBatch]:
    return lambda sampling: DecodeBatch(loaded, sampling, StopConditions(20), graph)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("family", CASES)
def test_recorded_steps_give_what_launched_ones_give(
    world: World,
    comm: "Intracomm",
    tmp_path: Path,
    fresh_seed: int,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    exact: bool,
) -> None:
    """Rows of padding are in all replays, change no other row, and cost no expert anything."""
    monkeypatch.setattr(decode_recorder, "PATIENCE", 1)
    path = Path(comm.bcast(str(tmp_path)))
    if comm.rank == 0:
        write_model(Case(family, family), path, torch.float32, fresh_seed % 1000)
    comm.barrier()
    options = SpreadOptions(exact=exact, whole_block=CASES[family])
    loaded = load_model(path, ProcessGrid.create(world), options=options)
    expected, slots = answer(world, loaded, fresh_seed, padded_batch(loaded, None))
    stand_in = StandIn(loaded)
    graph = DecodeGraph(loaded, stand_in.record, stand_in.join)
    found, counted = answer(world, loaded, fresh_seed, padded_batch(loaded, graph))
    replayed = comm.allgather(graph.replayed)
    assert min(replayed) == max(replayed) > 4 and graph.refused is None
    assert counted == slots and found.keys() == expected.keys()
    errors = [float((found[at] - logits).norm() / logits.norm()) for at, logits in expected.items()]
    assert max(errors) < 1e-3


@pytest.mark.parametrize("family", CASES)
def test_flat_steps_that_are_recorded_give_what_padded_ones_give(
    world: World, comm: "Intracomm", tmp_path: Path, fresh_seed: int, family: str
) -> None:
    """All ranks replay the same rows, one without sequences, too; one that reads a prompt stops that."""
    path = Path(comm.bcast(str(tmp_path)))
    if comm.rank == 0:
        write_model(Case(family, family), path, torch.float32, fresh_seed % 1000)
    comm.barrier()
    loaded = load_model(path, ProcessGrid.create(world), options=SpreadOptions(whole_block=CASES[family]))
    expected, _ = answer(world, loaded, fresh_seed, padded_batch(loaded, None))
    forms = flat_forms(loaded)
    assert not isinstance(forms, str)
    pool = SpanPool(forms, 20, torch.device("cpu"), SpanAttention("definition"))
    limits, conditions = FlatLimits(BATCH, 1 + fresh_seed % 12), StopConditions(20)
    _, slots = answer(world, loaded, fresh_seed, lambda s: FlatBatch(loaded, s, conditions, pool, limits))
    recorder = FlatRecorder(loaded, pool, StandIn(loaded).record)
    found, counted = answer(
        world, loaded, fresh_seed, lambda s: FlatBatch(loaded, s, conditions, pool, limits, recorder)
    )
    replayed = comm.allgather(recorder.replayed)
    assert min(replayed) == max(replayed) > 4 and recorder.refused is None
    assert counted == slots and found.keys() == expected.keys()
    errors = [float((found[at] - logits).norm() / logits.norm()) for at, logits in expected.items()]
    assert max(errors) < 1e-3


def test_layers_ask_nothing(
    world: World,
    comm: "Intracomm",
    tmp_path: Path,
    fresh_seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither where prompts are read nor where they are continued; afterwards they do again."""
    asked: list[str] = []
    handshake = base.handshake

    def count(group: Any, tag: Any, **wanted: Any) -> Any:
        asked.append(str(tag))
        return handshake(group, tag, **wanted)

    monkeypatch.setattr(base, "handshake", count)
    path = Path(comm.bcast(str(tmp_path)))
    if comm.rank == 0:
        write_model(Case("olmoe", "olmoe"), path, torch.float32, fresh_seed % 1000)
    comm.barrier()
    loaded = load_model(path, ProcessGrid.create(world))
    answer(world, loaded, fresh_seed, padded_batch(loaded, None))
    assert not asked or world.size == 1
    asked.clear()
    loaded.join()
    assert len(asked) == len(loaded.layers)
