"""Steps in fixed places give what growing ones give, whoever goes on and however long.

Recordings are called for when they pay.

A CUDA graph replays what is called here; ``tests/gpu/check_generate.py`` compares those, on a GPU.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_families import Case
from tiny_models import BYTES, FAMILIES, plain_model, write_model
from torch import Tensor

from xpar.comm.dispatch.choose import DISPATCHERS
from xpar.engine.generation import decode_graph, recorder
from xpar.engine.generation.decode_batch import DecodeBatch
from xpar.engine.generation.decode_graph import PaddedDecodeStep
from xpar.engine.generation.recorder import PATIENCE, DecodeGraph, bucket_of
from xpar.engine.generation.recordings import follow_replay
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWS = {"gpt_oss": {"sliding_window": 4}, "mixtral": {"sliding_window": 4}}
HOST = torch.device("cpu")


@dataclass(frozen=True)
class Remembering(Sampling):
    """Greedy, and keeps all logits that it sees."""

    seen: list[Tensor] = field(default_factory=list)

    def choose(self, logits: Tensor, generators: Any) -> list[int]:
        self.seen.append(logits.clone())
        return super().choose(logits, generators)


def loaded(model: Any) -> Any:
    return SimpleNamespace(
        model=model, device=HOST, layers=(), slots=lambda: 0, expect=lambda tokens: None, join=lambda: None
    )


class Replays:
    """Stands for a graph: calls the forward, and counts."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, step: PaddedDecodeStep) -> Callable[[], Tensor]:
        self.recorded += 1
        step.forward()  # a rehearsal leaves no trace
        step.rewind()

        def replay() -> Tensor:
            self.replayed += 1
            return step.forward()

        return replay


def prompts(seed: int, count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (count,), generator=generator).tolist()
    return [torch.randint(BYTES, (n,), generator=generator).tolist() for n in lengths]


def answers(model: Any, seed: int, recording: DecodeGraph | None) -> tuple[list[list[int]], list[Tensor]]:
    """Eight prompts, four at a time, as long as their first tokens say; one that ends makes place."""
    sampling = Remembering()
    limits = StopConditions(30, stopped=lambda answer: len(answer) >= 5 + 6 * (answer[0] % 3))
    sequences = DecodeBatch(loaded(model), sampling, limits, recording)
    waiting = [RunningSequence(n, ids, torch.Generator()) for n, ids in enumerate(prompts(seed, 8))]
    everyone = list(waiting)
    sequences.begin([waiting.pop(0) for _ in range(4)])
    while sequences.running:
        if sequences.advance() and waiting:
            sequences.begin([waiting.pop(0)])
    return [r.answer for r in everyone], sampling.seen


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_and_logits_are_those_of_growing_caches(
    name: str, tmp_path: Path, fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So little room that a recording is renewed, and windows shorter than the answers.

    In float64, so that neither a router nor a choice of tokens hangs on a rounding.
    """
    monkeypatch.setattr(decode_graph, "UNIT", 1)
    monkeypatch.setattr(decode_graph, "LEAST_ROOM", 3)
    monkeypatch.setattr(recorder, "PATIENCE", 1)
    write_model(Case(name, name, WINDOWS.get(name, {})), tmp_path, torch.float32, fresh_seed % 1000)
    model, replays = plain_model(tmp_path, torch.float64), Replays()
    model.set_experts_implementation("eager")  # grouped products have no float64
    texts, logits = answers(model, fresh_seed, None)
    found, seen = answers(model, fresh_seed, DecodeGraph(loaded(model), replays))
    assert replays.replayed > 8 and replays.recorded > 1  # renewed, however short the answers
    assert found == texts and len(seen) == len(logits)
    for a, b in zip(seen, logits, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-6


def test_recordings_wait_until_they_pay(tmp_path: Path, fresh_seed: int) -> None:
    write_model(Case("olmoe", "olmoe"), tmp_path, torch.float32, 1)
    replays = Replays()
    recording = DecodeGraph(loaded(plain_model(tmp_path)), replays)
    sequences = DecodeBatch(recording._loaded, Sampling(), StopConditions(10**6), recording)
    first, second = (
        RunningSequence(n, ids, torch.Generator()) for n, ids in enumerate(prompts(fresh_seed, 2))
    )
    sequences.begin([first])
    for step in range(PATIENCE + 3):
        sequences.advance()
        assert (replays.recorded, replays.replayed) == (step >= PATIENCE, max(0, step + 1 - PATIENCE))
    sequences.begin([second])
    for _ in range(PATIENCE):
        sequences.advance()
    assert (replays.recorded, replays.replayed) == (1, 3)
    sequences.advance()
    assert (replays.recorded, replays.replayed) == (2, 4)


def test_what_cannot_be_recorded_goes_on_as_before(
    tmp_path: Path, fresh_seed: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "PATIENCE", 1)
    write_model(Case("olmoe", "olmoe"), tmp_path, torch.float32, 1)
    model, asked = plain_model(tmp_path), []

    def refuse(step: PaddedDecodeStep) -> Callable[[], Tensor]:
        asked.append(step)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with caplog.at_level(logging.INFO, "xpar.models"):
        found, _ = answers(model, fresh_seed, DecodeGraph(loaded(model), refuse))
    assert found == answers(model, fresh_seed, None)[0] and len(asked) == 1
    assert "steps are not recorded: operation not permitted when stream is capturing" in caplog.text


def test_several_ranks_record_and_replay_together(tmp_path: Path, fresh_seed: int) -> None:
    """Two ranks in one process replay nothing until both are ready, and record in the same step."""
    write_model(Case("olmoe", "olmoe"), tmp_path, torch.float32, 1)
    model, counts = plain_model(tmp_path), [Replays(), Replays()]
    joined: list[str] = []

    def join_of(rows: int) -> Callable[[], None]:
        joined.append(f"recorded {rows}")
        return lambda: joined.append("replayed")

    recorders = [DecodeGraph(loaded(model), replays, join_of) for replays in counts]
    ranks = [
        DecodeBatch(loaded(model), Sampling(), StopConditions(10**6), recorder) for recorder in recorders
    ]
    new = [RunningSequence(n, ids, torch.Generator()) for n, ids in enumerate(prompts(fresh_seed, 3))]

    def take_step(*begun: list[RunningSequence]) -> None:
        readiness = tuple(rank.readiness() for rank in ranks)
        tokens = None if any(begun) else tuple(rank.occupied for rank in ranks)
        for rank, mine in zip(ranks, begun or ([], []), strict=True):
            rank.agree(tokens, readiness)
            if mine:
                rank.begin(mine)
            elif rank.occupied:
                rank.advance()
            else:
                rank.join()

    take_step(new[:1], [])
    for _ in range(PATIENCE):
        take_step()
    assert [c.recorded for c in counts] == [0, 0] and not joined
    for _ in range(2):  # the second rank has no sequences, and serves the first by a recording
        take_step()
    assert [c.replayed for c in counts] == [2, 0] and joined == ["recorded 1", "replayed", "replayed"]
    take_step([], new[1:2])
    for _ in range(PATIENCE):  # the first rank's sequences go on, but the second's are new
        take_step()
    assert [c.replayed for c in counts] == [2, 0] and len(joined) == 3
    for _ in range(3):
        take_step()
    assert [(c.recorded, c.replayed) for c in counts] == [(2, 5), (1, 3)]
    recorders[1].refused = "planted"
    take_step()
    assert [c.replayed for c in counts] == [5, 3]


def test_numbers_that_fit_into_the_bucket_go_on_replaying(tmp_path: Path, fresh_seed: int) -> None:
    """Sequences end and begin; what no longer fits is launched, and a bucket twice too large is renewed."""
    write_model(Case("olmoe", "olmoe"), tmp_path, torch.float32, 1)
    replays = Replays()
    recording = DecodeGraph(loaded(plain_model(tmp_path)), replays)
    lengths: dict[int, int] = {}
    limits = StopConditions(10**6)
    sequences = DecodeBatch(recording._loaded, Sampling(), limits, recording)
    new = [
        RunningSequence(
            n, ids, torch.Generator(), stopped=lambda answer, n=n: len(answer) >= lengths.get(n, 10**6)
        )
        for n, ids in enumerate(prompts(fresh_seed, 8))
    ]

    def take(steps: int) -> tuple[int, int]:
        for _ in range(steps):
            sequences.advance()
        return replays.recorded, replays.replayed

    def end(*places: int) -> None:
        for place in places:
            lengths[place] = 1
        sequences.advance()

    sequences.begin(new[:3])
    assert take(PATIENCE + 1) == (1, 1) and recording._bucket == 4
    end(0)
    assert take(2) == (1, 4)
    sequences.begin(new[3:5])  # four of four
    assert take(2) == (1, 6) and len(sequences.running) == 4
    sequences.begin(new[5:6])  # five
    assert take(PATIENCE) == (1, 6)
    assert take(1) == (2, 7) and recording._bucket == 8
    end(1, 2, 3)
    assert take(PATIENCE) == (2, 8 + PATIENCE)
    assert take(1) == (3, 9 + PATIENCE) and recording._bucket == 2


def test_a_rank_that_runs_out_of_sequences_goes_on_with_its_recording(
    tmp_path: Path, fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its rows are padding then, for more steps than there was room for."""
    monkeypatch.setattr(decode_graph, "UNIT", 1)
    monkeypatch.setattr(decode_graph, "LEAST_ROOM", 3)
    monkeypatch.setattr(recorder, "PATIENCE", 1)
    write_model(Case("olmoe", "olmoe"), tmp_path, torch.float32, 1)
    replays = Replays()
    recording = DecodeGraph(loaded(plain_model(tmp_path)), replays)
    ids = prompts(fresh_seed, 1)[0]
    texts = []
    for is_recorded in (False, True):
        sequences = DecodeBatch(
            recording._loaded, Sampling(), StopConditions(3), recording if is_recorded else None
        )
        for _ in range(2):
            question = RunningSequence(0, ids, torch.Generator())
            sequences.begin([question])
            while sequences.running:
                if is_recorded:
                    sequences.agree((1,), (sequences.readiness(),))
                sequences.advance()
            texts.append(question.answer)
            for _ in range(12 * is_recorded):
                sequences.agree((1,), (sequences.readiness() & recorder.CAN_REPLAY,))
                sequences.join()
    assert replays.recorded == 1 and replays.replayed > 24
    assert all(text == texts[0] for text in texts)


def test_buckets() -> None:
    assert [bucket_of(n) for n in (0, 1, 2, 3, 9, 17, 33, 49, 64, 65, 97, 225, 257, 500, 513)] == [
        1, 1, 2, 4, 16, 24, 48, 64, 64, 96, 128, 256, 320, 512, 640,
    ]  # fmt: skip
    for n in range(1, 1100):
        assert n <= bucket_of(n) <= max(2 * n, 1) and bucket_of(bucket_of(n)) == bucket_of(n)


def recorder_of(
    device: str, exact: bool, size: int, dispatcher: str = "allgather", transport: str = "staged"
) -> DecodeGraph | None:
    """The recorder of a model with layers of this kind."""
    capabilities = next(cls.capabilities for cls in DISPATCHERS if cls.name == dispatcher)
    opened = SimpleNamespace(choice=SimpleNamespace(name=transport), watch=None, follow=followed.append)
    runner = SimpleNamespace(
        options=SimpleNamespace(exact=exact),
        grid=SimpleNamespace(world=SimpleNamespace(size=size), transport=opened),
        dispatcher=SimpleNamespace(capabilities=capabilities),
    )
    layer = SimpleNamespace(runner=runner, slot_counter=SimpleNamespace(counted=torch.zeros(())))
    model: Any = SimpleNamespace(device=torch.device(device), layers=(layer, layer), sends_tokens_once=True)
    return DecodeGraph.of(model)


followed: list[str] = []


def test_host_processors_and_layers_that_wait_are_not_recorded() -> None:
    assert recorder_of("cuda", False, 1, "replicated") is not None
    assert (
        recorder_of("cpu", False, 1) is recorder_of("cuda", True, 1) is recorder_of("cuda", False, 2) is None
    )
    assert recorder_of("cuda", False, 2, "one-sided") is not None
    assert recorder_of("cuda", True, 2, "one-sided") is not None
    assert recorder_of("cuda", True, 2, "nccl-ep", "nccl") is not None
    assert recorder_of("cpu", False, 2, "one-sided") is None


def test_steps_over_nccl_are_recorded_and_followed() -> None:
    """Where nothing waits for counts; kernels that store rows have a deadline of their own."""
    recorders = {
        name: recorder_of("cuda", False, 2, name, "nccl")
        for name in ("allgather", "alltoall", "one-sided", "nccl-ep")
    }
    assert recorders["alltoall"] is None and recorder_of("cuda", True, 2, "allgather", "nccl") is None
    followed_by_name = {"allgather": ["a recorded step"], "nccl-ep": ["a recorded step"], "one-sided": []}
    for name, expected in followed_by_name.items():
        followed.clear()
        found = recorders[name]
        assert found is not None
        follow_replay(found._loaded)
        assert followed == expected
