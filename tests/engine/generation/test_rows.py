"""A row's result is that of the row alone, whatever shares its batch, is cut from it or was read before."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from loaded_models import loaded
from row_models import DYNAMIC, LONG, ORIGINAL, OTHERS, ROPES, Variant, answer_alone, build, logprobs_alone
from torch import Tensor

from xpar.engine.generation import decode_graph, recorder
from xpar.engine.generation.decode_batch import DecodeBatch
from xpar.engine.generation.decode_graph import PaddedDecodeStep
from xpar.engine.generation.recorder import DecodeGraph
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.score_batch import ScoreBatch, ScoredText
from xpar.engine.models.rotary import RowRotary, depends_on_length, keeps_state
from xpar.engine.models.rows import SeparateRows

pytestmark = pytest.mark.usefixtures("one_thread")

HOST = torch.device("cpu")
NEW = 9
LENGTHS = (2, 5, ORIGINAL - 5, *range(ORIGINAL - 2, ORIGINAL + 3), 25, 40)
SCORED = OTHERS
BY_NAME = {v.name: v for v in (*ROPES, *OTHERS)}


@dataclass(frozen=True)
class Remembering(Sampling):
    """Greedy, and keeps the logits of each sequence."""

    seen: dict[Any, list[Tensor]] = field(default_factory=dict)

    def choose(self, logits: Tensor, generators: Any) -> list[int]:
        for generator, row in zip(generators, logits, strict=True):
            self.seen.setdefault(generator, []).append(row.clone())
        return super().choose(logits, generators)


def texts(draw: random.Random, count: int) -> list[list[int]]:
    return [[draw.randrange(256) for _ in range(draw.choice(LENGTHS))] for _ in range(count)]


def compare_scores(model: Any, draw: random.Random) -> None:
    """Random batches, with random pieces, by one model that goes on from text to text."""
    lines = texts(draw, 8)
    piece = draw.choice([5, 7, 1000])
    scorer = ScoreBatch(loaded(copy.deepcopy(model)), 4, piece)
    waiting = [ScoredText(n, ids, 1) for n, ids in enumerate(lines)]
    everyone = list(waiting)
    while waiting:
        new = [waiting.pop()]
        while (
            waiting
            and len(new) < draw.randint(1, 4)
            and max(len(s.inputs) for s in [*new, waiting[-1]]) <= piece
        ):
            new.append(waiting.pop())
        scorer.begin(new)
        while scorer.occupied:
            scorer.advance()
    for scored in everyone:
        expected = logprobs_alone(copy.deepcopy(model), scored.ids)
        assert torch.tensor(scored.logprobs).double().sub(expected).abs().max() < 1e-4, len(scored.ids)


def compare_answers(
    model: Any,
    draw: random.Random,
    recording: Callable[[Any], DecodeGraph] | None = None,
    arrivals: float = 0.4,
) -> None:
    """Prompts begin while others go on; each is compared until a choice depends on a rounding."""
    lines, sampling = texts(draw, 7), Remembering()
    mine = loaded(copy.deepcopy(model))
    sequences = DecodeBatch(
        mine, sampling, StopConditions(NEW), None if recording is None else recording(mine)
    )
    waiting = [RunningSequence(n, ids, torch.Generator()) for n, ids in enumerate(lines)]
    everyone = list(waiting)
    while waiting or sequences.running:
        if waiting and (not sequences.running or draw.random() < arrivals):
            sequences.begin([waiting.pop() for _ in range(min(len(waiting), draw.randint(1, 3)))])
        else:
            sequences.advance()
    for r in everyone:
        alone = answer_alone(copy.deepcopy(model), r.ids, NEW)
        same = [a == b for a, b in zip(alone.answer, r.answer, strict=True)]
        until = NEW if all(same) else same.index(False) + 1
        logits = torch.stack(sampling.seen[r.generator])[:until]
        assert logits.log_softmax(-1).sub(alone.logits[:until].log_softmax(-1)).abs().max() < 1e-4, len(r.ids)
        assert all(same) or alone.gap < 1e-3


@pytest.mark.parametrize("variant", [*ROPES, *SCORED], ids=lambda v: v.name)
def test_scores_are_those_of_the_text_alone(fresh_seed: int, variant: Variant) -> None:
    compare_scores(build(variant, fresh_seed % 1000), random.Random(fresh_seed))


@pytest.mark.parametrize("variant", [*ROPES, *OTHERS], ids=lambda v: v.name)
def test_answers_are_those_of_the_prompt_alone(fresh_seed: int, variant: Variant) -> None:
    compare_answers(build(variant, fresh_seed % 1000), random.Random(fresh_seed))


@pytest.mark.parametrize(
    "name", ["qwen3_moe-longrope", "olmoe-dynamic", "phimoe-longrope", "llama4-chunks", "gpt_oss-window"]
)
def test_recorded_steps_give_the_same(fresh_seed: int, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So little room, and so short a wait, that most steps are ones that a GPU would replay."""
    monkeypatch.setattr(decode_graph, "UNIT", 1)
    monkeypatch.setattr(decode_graph, "LEAST_ROOM", 3)
    monkeypatch.setattr(recorder, "PATIENCE", 1)
    recorders: list[DecodeGraph] = []

    def recording(mine: Any) -> DecodeGraph:
        recorders.append(DecodeGraph(mine, rehearsed))
        return recorders[0]

    compare_answers(build(BY_NAME[name], fresh_seed % 1000), random.Random(fresh_seed), recording, 0.1)
    assert recorders[0].replayed > 3


def rehearsed(step: PaddedDecodeStep) -> Callable[[], Tensor]:
    """Stands for a graph: calls the forward, once more than its results are wanted."""
    step.forward()
    step.rewind()
    return step.forward


@pytest.mark.parametrize("rope", [None, LONG, DYNAMIC], ids=["default", "longrope", "dynamic"])
def test_what_a_rotary_module_depends_on_is_found_out(rope: Any) -> None:
    rotary = build(Variant("x", "qwen3_moe", rope), 0).model.rotary_emb
    fresh = copy.deepcopy(rotary)
    assert depends_on_length(rotary) is (rope is not None)
    assert keeps_state(rotary) is (rope is DYNAMIC)
    for length in (ORIGINAL, ORIGINAL + 9):  # looking leaves no trace
        positions, x = torch.arange(length)[None], torch.zeros(1)
        assert all(torch.equal(a, b) for a, b in zip(rotary(x, positions), fresh(x, positions), strict=True))


@pytest.mark.parametrize("rope", [LONG, DYNAMIC], ids=["longrope", "dynamic"])
@pytest.mark.parametrize("shared", [False, True], ids=["own-positions", "shared-positions"])
def test_rotary_factors_are_those_of_each_row(fresh_seed: int, rope: Any, shared: bool) -> None:
    """Bit by bit, in random order, the rest of a text in other calls."""
    draw = random.Random(fresh_seed)
    module = build(Variant("x", "qwen3_moe", rope), 0).model.rotary_emb
    wrapped, x, columns = RowRotary(copy.deepcopy(module), keeps_state(module)), torch.zeros(1), 6
    for _ in range(20):
        lengths = [draw.choice([columns, ORIGINAL, ORIGINAL + 1, 30, 50]) for _ in range(draw.randint(1, 5))]
        begins = [0 if shared else draw.randint(0, length - columns) for length in lengths]
        wrapped.lengths = lengths
        positions = torch.stack([torch.arange(begin, begin + columns) for begin in begins])
        found = wrapped(x, positions[:1] if shared else positions)
        for row, (length, begin) in enumerate(zip(lengths, begins, strict=True)):
            whole = copy.deepcopy(module)(x, torch.arange(length)[None])
            for a, b in zip(found, whole, strict=True):
                assert torch.equal(a[row if len(a) > 1 else 0], b[0, begin : begin + columns])
        wrapped.lengths = None
        last = torch.tensor([[length - 1] for length in lengths])
        for a, length in zip(wrapped(x, last)[0], lengths, strict=True):
            assert torch.equal(a[0], copy.deepcopy(module)(x, torch.arange(length)[None])[0][0, -1])


def test_a_sequence_is_read_again_where_generate_does_so() -> None:
    again = SeparateRows(build(BY_NAME["phimoe-longrope"], 0)).needs_whole_past
    assert [length for length in range(1, 60) if again(length)] == [ORIGINAL + 1]
    never = SeparateRows(build(BY_NAME["qwen3_moe-longrope"], 0)).needs_whole_past
    assert not any(map(never, range(1, 60)))


def test_a_model_is_changed_once() -> None:
    model = build(BY_NAME["llama4-temperature"], 0)
    SeparateRows(model)
    names = [name for name, _ in model.named_modules()]
    SeparateRows(model)
    assert names == [name for name, _ in model.named_modules()]
    assert sum(name.endswith("q_proj.projection") for name in names) == 1
