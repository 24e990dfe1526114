"""Sequences of models whose states cannot be padded, in groups of equal length."""

import random

import pytest
import torch
from greedy_answers import assert_greedy
from loaded_models import loaded
from shrunk_families import small_model

from xpar.engine.generation.choose_batch import choose_batch
from xpar.engine.generation.decode_batch import DecodeBatch
from xpar.engine.generation.grouped_batch import GroupedBatch, by_length
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {
    "recurrent and index": ("glm5_next", "Glm5NextForConditionalGeneration"),
    "a cache of its own": ("minimax", "MiniMaxForCausalLM"),
    "compressed": ("deepseek_v4", "DeepseekV4ForCausalLM"),
    "an index": ("deepseek_v32", "DeepseekV32ForCausalLM"),
    "window and convolution": ("inkling_text", "InklingForCausalLM"),
}
NEW = 6


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_each_prompt_alone(fresh_seed: int, family: str) -> None:
    """Prompts of a few lengths come in at random steps and end at random lengths; groups merge and shrink."""
    model, draw = small_model(*FAMILIES[family], seed=3), random.Random(fresh_seed)
    batch = choose_batch(loaded(model), Sampling(), StopConditions(NEW))
    assert isinstance(batch, GroupedBatch)
    waiting = [
        RunningSequence(
            place,
            [draw.randrange(3, 190) for _ in range(draw.choice((3, 4, 5, 11)))],
            torch.Generator(),
            stopped=lambda answer, most=most: len(answer) >= most,
        )
        for place, most in enumerate(draw.choices(range(1, NEW + 1), k=9))
    ]
    everyone, ended, merged = list(waiting), [], 0
    while waiting or batch.occupied:
        groups = len(batch._groups) + len(batch._waiting)
        if waiting and (not batch.occupied or draw.random() < 0.5):
            new = [waiting.pop() for _ in range(min(len(waiting), draw.randint(1, 4)))]
            ended += batch.begin(new)
        else:
            ended += batch.advance()
            merged += len(batch._groups) + len(batch._waiting) < groups
    assert sorted(r.place for r in ended) == list(range(9)) and merged
    assert batch.tokens == sum(len(r.answer) for r in everyone)
    for r in everyone:
        assert r.failure is None and r.answer
        assert_greedy(model, r)


def test_groups_of_equal_length_become_one() -> None:
    model = small_model(*FAMILIES["an index"], seed=3)
    batch = GroupedBatch(loaded(model), Sampling(), StopConditions(NEW))
    first = RunningSequence(0, [5, 6, 7], torch.Generator())
    batch.begin([first])
    batch.advance()
    second = RunningSequence(1, [9, 8, 7, 6], torch.Generator())
    batch.begin([second])
    assert len(batch._groups) == 1 and batch.occupied == 2
    while batch.occupied:
        batch.advance()
    for r in (first, second):
        assert_greedy(model, r)


def test_different_lengths_in_one_forward_are_refused() -> None:
    model = small_model(*FAMILIES["an index"], seed=3)
    batch = DecodeBatch(loaded(model), Sampling(), StopConditions(NEW))
    with pytest.raises(ValueError, match=r"sequences of \[2, 3\] tokens in one forward"):
        batch.begin([RunningSequence(n, [5] * (n + 2), torch.Generator()) for n in range(2)])


def test_prompts_are_divided_by_length_the_longest_first() -> None:
    rows = [RunningSequence(n, [1] * length, torch.Generator()) for n, length in enumerate((2, 5, 2, 3))]
    assert [[r.place for r in group] for group in by_length(rows)] == [[1], [3], [0, 2]]
