"""Hybrid models: prompts of equal length are read together, and all sequences go on together."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from greedy_answers import assert_greedy
from loaded_models import loaded
from shrunk_families import NOT_RUN, classes, empty_small_model, families, small_model
from torch import Tensor

from xpar.engine.generation import decode_graph, recorder
from xpar.engine.generation.choose_batch import choose_batch
from xpar.engine.generation.decode_batch import DecodeBatch
from xpar.engine.generation.decode_graph import PaddedDecodeStep
from xpar.engine.generation.lengthwise_batch import LengthwiseBatch
from xpar.engine.generation.recorder import DecodeGraph
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.models.kv_cache import other_states
from xpar.engine.models.state_cache import mixes_lengths

pytestmark = pytest.mark.usefixtures("one_thread")
NEW, LAST = 8, 14
"""The most tokens of an answer, and of one that goes on alone: steps of the same sequences are recorded."""


def hybrids() -> list[str]:
    """List the families whose sequences go on together although they keep more than keys and values."""
    found = []
    for family in families():
        if family not in NOT_RUN:
            model = empty_small_model(*next(iter(classes(family))))
            if other_states(model.config) and mixes_lengths(model):
                found.append(family)
    return found


HYBRIDS = hybrids()


def test_they_are_found_out_by_their_caches() -> None:
    usual = {"bailing_hybrid", "granitemoehybrid", "jamba", "kimi_linear", "lfm2_moe", "nemotron_h"}
    assert (usual | {"qwen3_5_moe", "qwen3_next"}) & set(families()) <= set(HYBRIDS)


class Replays:
    """Stands for a graph: calls the forward, once more than its results are wanted, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, step: PaddedDecodeStep) -> Callable[[], Tensor]:
        step.forward()
        step.rewind()

        def replay() -> Tensor:
            self.count += 1
            return step.forward()

        return replay


@pytest.mark.parametrize("records", [False, True], ids=["launched", "recorded"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_answers_are_those_of_each_prompt_alone(
    fresh_seed: int, family: str, records: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of random lengths come in at random steps and end at random lengths, in little room."""
    monkeypatch.setattr(decode_graph, "UNIT", 1)
    monkeypatch.setattr(decode_graph, "LEAST_ROOM", 3)
    monkeypatch.setattr(recorder, "PATIENCE", 1)
    model, draw, replays = (
        small_model(*next(iter(classes(family))), seed=3),
        random.Random(fresh_seed),
        Replays(),
    )
    mine = loaded(model)
    batch: Any = choose_batch(mine, Sampling(), StopConditions(LAST))
    assert isinstance(batch, LengthwiseBatch)
    if records:
        batch = LengthwiseBatch(
            DecodeBatch(mine, Sampling(), StopConditions(LAST), DecodeGraph(mine, replays))
        )
    waiting = [
        RunningSequence(
            place,
            [draw.randrange(3, 190) for _ in range(draw.choice((1, 3, 4, 5, 11)))],
            torch.Generator(),
            stopped=lambda answer, most=most: len(answer) >= most,
        )
        for place, most in enumerate([LAST, *draw.choices(range(1, NEW + 1), k=8)])
    ]
    everyone, ended, together = list(waiting), [], 0
    while waiting or batch.occupied:
        if waiting and (not batch.occupied or draw.random() < 0.25):
            new = [waiting.pop() for _ in range(min(len(waiting), draw.randint(1, 4)))]
            longest = max(len(r.ids) for r in new)
            of_longest = sum(len(r.ids) == longest for r in new)
            assert batch.tokens_of([len(r.ids) for r in new], 0) == longest * of_longest
            ended += batch.begin(new)
        else:
            running = batch._batch.running if not batch._waiting else []
            together += len({len(r.ids) + len(r.answer) for r in running}) > 1
            assert batch.next_tokens == (
                len(running) or len(batch._waiting[0]) * len(batch._waiting[0][0].ids)
            )
            ended += batch.advance()
    assert sorted(r.place for r in ended) == list(range(9)) and together
    assert batch.tokens == sum(len(r.answer) for r in everyone)
    assert not records or replays.count
    for r in everyone:
        assert r.failure is None and r.answer
        assert_greedy(model, r)
