"""Flat batches give each prompt what it gets alone: arrivals, pieces, sharing, preemption, recordings.

A pool of spans, which GPUs have, is read by the definition of its attention here, and a CUDA graph replays
what is called here; ``tests/gpu/check_flat.py`` has torch's attention and real graphs.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loaded_models import loaded
from shrunk_families import small_model
from tiny_models import CLEAR

from xpar.engine.generation import flat_recorder
from xpar.engine.generation.choose_batch import choose_batch
from xpar.engine.generation.decode_batch import DecodeBatch
from xpar.engine.generation.decode_graph import FixedStep
from xpar.engine.generation.flat_batch import FlatBatch, FlatLimits
from xpar.engine.generation.flat_recorder import FlatRecorder, Record
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.span_plan import WORTH, SpanPlanner
from xpar.engine.models.flat_forward import flat_forms
from xpar.engine.models.kv_pool import BLOCK_TOKENS, KvPool
from xpar.engine.models.span_pool import SpanPool
from xpar.kernels.gpu.span_attention import SpanAttention

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {
    "plain": ("olmoe", "OlmoeForCausalLM"),
    "sinks and windows": ("gpt_oss", "GptOssForCausalLM"),
    "windows, keys that are values": ("gemma4_text", "Gemma4ForCausalLM"),
    "narrow values": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "two attentions a layer": ("longcat_flash", "LongcatFlashForCausalLM"),
    "repeated keys": ("jetmoe", "JetMoeForCausalLM"),
    "window layers of another form": ("mimo_v2_flash", "MiMoV2FlashForCausalLM"),
}
NEW, PROMPTS = 6, 7
COMMON = 2 * BLOCK_TOKENS + 3


POOLS = ("blocks", "spans", "recorded")


def rehearsed(step: FixedStep) -> Callable[[], torch.Tensor]:
    step.forward()
    step.rewind()
    return step.forward


def make_flat(
    model: Any,
    blocks: int,
    size: FlatLimits,
    new: int = NEW,
    pool_of: str = "blocks",
    record: Record = rehearsed,
) -> FlatBatch:
    """A batch whose pool is full of NaN, as memory may be: nothing of it is to be read."""
    holder = loaded(model)
    forms = flat_forms(holder)
    assert not isinstance(forms, str), forms
    conditions = StopConditions(new)
    if pool_of == "blocks":
        pool = KvPool(forms, blocks)
        fill(pool.keys + pool.values)
        return FlatBatch(holder, Sampling(), conditions, pool, size)
    spans = SpanPool(forms, blocks, torch.device("cpu"), SpanAttention("definition"))
    fill(spans.keys + spans.values)
    recorder = FlatRecorder(holder, spans, record) if pool_of == "recorded" else None
    return FlatBatch(holder, Sampling(), conditions, spans, size, recorder)


def free_blocks(batch: FlatBatch) -> int:
    planner = batch.planner
    return planner.runs.available if isinstance(planner, SpanPlanner) else planner.pool.available


def fill(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        tensor.fill_(float("nan"))


def draw_prompts(draw: random.Random, count: int) -> list[list[int]]:
    """Prompts of many lengths, half of which begin alike."""
    common = [draw.randrange(3, 190) for _ in range(COMMON)]
    return [
        (common if n % 2 else []) + [draw.randrange(3, 190) for _ in range(draw.choice([1, 2, 9, 17, 30]))]
        for n in range(count)
    ]


def run(batch: FlatBatch, prompts: list[list[int]], draw: random.Random) -> list[RunningSequence]:
    """Answer ``prompts``, which arrive a few at a time."""
    sequences = [RunningSequence(n, ids, torch.Generator()) for n, ids in enumerate(prompts)]
    waiting, ended = list(sequences), []
    while waiting or batch.occupied:
        count = draw.choice([0, 0, 1, 3])
        new, waiting = waiting[:count], waiting[count:]
        ended += batch.begin(new) if new else batch.advance()
    assert sorted(r.place for r in ended) == list(range(len(prompts)))
    return sequences


@torch.inference_mode()
def assert_greedy(model: Any, r: RunningSequence, new: int = NEW) -> None:
    """Check the answer against the definition: no cache, no batch."""
    assert r.failure is None and len(r.answer) == new
    ids = list(r.ids)
    for token in r.answer:
        best = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < CLEAR:
            return
        assert token == int(best.indices[0]), f"prompt {r.place}, after {len(ids)} tokens"
        ids.append(token)


@pytest.mark.parametrize("pool_of", POOLS)
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_each_prompt_alone(fresh_seed: int, family: str, pool_of: str) -> None:
    draw = random.Random(fresh_seed)
    model = small_model(*FAMILIES[family], seed=3)
    shares = draw.random() < 0.5
    size = FlatLimits(draw.choice([2, 5]), draw.choice([1, 7, 24, 4096]), shares)
    batch = make_flat(model, 40, size, pool_of=pool_of)
    for r in run(batch, draw_prompts(draw, PROMPTS), draw):
        assert_greedy(model, r)
    assert batch.recorder is None or batch.recorder.replayed > 0


@pytest.mark.parametrize("shares", [True, False], ids=["shared", "alone"])
def test_a_small_pool_drops_the_youngest_and_reads_it_again(fresh_seed: int, shares: bool) -> None:
    """Sequences that begin with two blocks and end with four, in a pool of nine; few of them begin alike."""
    draw = random.Random(fresh_seed)
    model = small_model("olmoe", "OlmoeForCausalLM", seed=3)
    new = 24
    prompts = [[draw.randrange(3, 190) for _ in range(draw.randint(28, 31))] for _ in range(PROMPTS)]
    prompts[1] = prompts[0][:BLOCK_TOKENS] + prompts[1][BLOCK_TOKENS:]
    batch = make_flat(model, 9, FlatLimits(4, 64, shares), new)
    for r in run(batch, prompts, draw):
        assert_greedy(model, r, new)
    assert batch.planner.preempted > 0
    assert free_blocks(batch) == 9


@pytest.mark.parametrize("shares", [True, False], ids=["shared", "alone"])
@pytest.mark.parametrize("pool_of", ["spans", "recorded"])
def test_sequences_wait_for_a_run_in_a_small_pool(fresh_seed: int, pool_of: str, shares: bool) -> None:
    draw = random.Random(fresh_seed)
    model = small_model("olmoe", "OlmoeForCausalLM", seed=3)
    batch = make_flat(model, 9, FlatLimits(4, 64, shares), pool_of=pool_of)
    for r in run(batch, draw_prompts(draw, 2 * PROMPTS), draw):
        assert_greedy(model, r)
    assert free_blocks(batch) == 9


@pytest.mark.parametrize("pool_of", ["spans", "recorded"])
def test_a_common_beginning_is_copied(fresh_seed: int, pool_of: str) -> None:
    """Read once, by the first; a sequence that comes when that has ended copies it, too."""
    draw = random.Random(fresh_seed)
    model = small_model("olmoe", "OlmoeForCausalLM", seed=3)
    common = [draw.randrange(3, 190) for _ in range(WORTH + 3)]
    prompts = [common + [draw.randrange(3, 190) for _ in range(5)] for _ in range(4)]
    sequences = [RunningSequence(n, ids, torch.Generator()) for n, ids in enumerate(prompts)]
    batch = make_flat(model, 60, FlatLimits(8, 4096), pool_of=pool_of)
    batch.planner.add(sequences[:3])
    counts = []
    while batch.occupied:
        counts.append(batch.next_tokens)
        batch.advance()
    left = WORTH + 8 - WORTH // BLOCK_TOKENS * BLOCK_TOKENS
    assert counts[:2] == [WORTH + 8, 1 + 2 * left]
    batch.planner.add(sequences[3:])
    assert batch.next_tokens == left
    while batch.occupied:
        batch.advance()
    for r in sequences:
        assert_greedy(model, r)


def test_a_recording_serves_other_sequences_up_to_its_rows(
    fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is made where none serves; a smaller one when too many rows were replayed in vain."""
    monkeypatch.setattr(flat_recorder, "HALVINGS", 8)
    draw = random.Random(fresh_seed)
    model = small_model("olmoe", "OlmoeForCausalLM", seed=3)
    batch = make_flat(model, 60, FlatLimits(8, 4096), pool_of="recorded")
    recorder = batch.recorder
    assert recorder is not None
    news = [3, 3, 3, 14, 5]
    sequences = [
        RunningSequence(n, [draw.randrange(3, 190) for _ in range(3)], torch.Generator(), max_new_tokens=new)
        for n, new in enumerate(news)
    ]
    batch.begin(sequences[:4])
    made = [sorted(recorder.recordings)]
    while batch.occupied:
        if len(made) == 4:  # one runs, and one more is read in a launched step
            batch.planner.add(sequences[4:])
        batch.advance()
        made.append(sorted(recorder.recordings))
    # Of four rows a step needs one, which counts twice, then four steps two, and the next one again.
    assert made == [[], *[[4]] * 8, *[[1, 4]] * 5]
    for r, new in zip(sequences, news, strict=True):
        assert_greedy(model, r, new)


def take_step(batch: FlatBatch, rows: int, waiting: list[RunningSequence], most: int) -> int:
    """Begin up to ``most`` of those ``waiting``, as the loop of all ranks does; return what was wanted."""
    assert batch.next_tokens >= 0
    wanted = batch.wanted(rows)
    new = [waiting.pop(0) for _ in range(min(wanted, most, len(waiting)))]
    batch.begin(new) if new else batch.advance()
    return wanted


@pytest.mark.parametrize("pool_of", POOLS)
def test_a_batch_is_filled_over_several_steps_and_then_waits_for_rows(fresh_seed: int, pool_of: str) -> None:
    """Where steps are recorded; else each free row is taken at once."""
    draw = random.Random(fresh_seed)
    model = small_model("olmoe", "OlmoeForCausalLM", seed=3)
    rows = 16
    batch = make_flat(model, 100, FlatLimits(rows, 13, shares_prefixes=False), pool_of=pool_of)
    waiting = [
        RunningSequence(n, [draw.randrange(3, 190) for _ in range(4)], torch.Generator(), max_new_tokens=new)
        for n, new in enumerate([9, 10, 11, *[30] * 40])
    ]
    found = []
    while len(waiting) > 43 - rows - 3 and len(found) < 30:
        free = rows - batch.occupied
        found.append((free, take_step(batch, rows, waiting, most=3)))
    filling = [(16, 16), (13, 13), (10, 10), (7, 7), (4, 4), (1, 1)]
    full = [(0, 0)] * 4  # the first answers are complete, a step apart from each other
    if pool_of == "recorded":
        later = [(1, 0), (2, 2), (1, 0)]
        assert found[:13] == [*filling, *full, *later] and found[13:] == [(1, 0)] * 17
    else:
        assert found == [*filling, *full, *[(1, 1)] * 3]


def test_running_sequences_leave_the_budget_to_prompts(fresh_seed: int) -> None:
    draw = random.Random(fresh_seed)
    model = small_model("olmoe", "OlmoeForCausalLM", seed=3)
    batch = make_flat(model, 60, FlatLimits(8, 4), new=30)
    waiting = [
        RunningSequence(n, [draw.randrange(3, 190) for _ in range(3)], torch.Generator()) for n in range(8)
    ]
    wanted = [take_step(batch, 8, waiting, most=1) for _ in range(8)]
    assert wanted == [8, 7, 6, 5, 4, 3, 2, 1] and batch.next_tokens == 7 + 3


def test_a_model_that_cannot_be_recorded_launches(fresh_seed: int) -> None:
    draw = random.Random(fresh_seed)
    model = small_model("olmoe", "OlmoeForCausalLM", seed=3)
    attempts: list[FixedStep] = []

    def refuse(step: FixedStep) -> Callable[[], torch.Tensor]:
        attempts.append(step)
        raise RuntimeError("operation not permitted when stream is capturing")

    batch = make_flat(model, 40, FlatLimits(4, 4096), pool_of="recorded", record=refuse)
    for r in run(batch, draw_prompts(draw, PROMPTS), draw):
        assert_greedy(model, r)
    assert batch.recorder is not None and len(attempts) == 1
    assert batch.recorder.refused == "operation not permitted when stream is capturing"


@pytest.mark.parametrize("pool_of", POOLS)
def test_a_sequence_that_never_fits_fails_alone(fresh_seed: int, pool_of: str) -> None:
    """One that is too long at once, and one that grows too long."""
    draw = random.Random(fresh_seed)
    model = small_model("olmoe", "OlmoeForCausalLM", seed=3)
    lengths = (3 * BLOCK_TOKENS + 1, 3 * BLOCK_TOKENS - 2, 5)
    prompts = [[draw.randrange(3, 190) for _ in range(length)] for length in lengths]
    batch = make_flat(model, 3, FlatLimits(2, 4096), pool_of=pool_of)
    long, growing, short = run(batch, prompts, draw)
    assert_greedy(model, short)
    assert "its 49 tokens so far do not fit: the keys and values of 48 tokens do" in (long.failure or "")
    assert "give a larger --kv-memory" in (growing.failure or "") and len(growing.answer) < NEW
    assert free_blocks(batch) == 3


def test_a_common_beginning_is_read_once(fresh_seed: int) -> None:
    draw = random.Random(fresh_seed)
    model = small_model("olmoe", "OlmoeForCausalLM", seed=3)
    common = [draw.randrange(3, 190) for _ in range(COMMON)]
    prompts = [common + [draw.randrange(3, 190) for _ in range(5)] for _ in range(4)]
    sequences = [RunningSequence(n, ids, torch.Generator()) for n, ids in enumerate(prompts)]
    batch = make_flat(model, 40, FlatLimits(8, 4096))
    batch.planner.add(sequences)
    full = COMMON // BLOCK_TOKENS * BLOCK_TOKENS
    # Within one step, too: those behind the first read what it writes in that very step.
    assert batch.next_tokens == 4 * (COMMON + 5) - 3 * full
    while batch.occupied:
        batch.advance()
    for r in sequences:
        assert_greedy(model, r)


def test_a_beginning_that_is_read_in_pieces_is_known(fresh_seed: int) -> None:
    draw = random.Random(fresh_seed)
    model = small_model("olmoe", "OlmoeForCausalLM", seed=3)
    first = [draw.randrange(3, 190) for _ in range(COMMON)]
    batch = make_flat(model, 40, FlatLimits(8, BLOCK_TOKENS - 1))
    batch.begin([RunningSequence(0, first, torch.Generator())])
    for blocks in (0, 1, 2):
        assert len(batch.planner.pool.find([*first, 5])) == blocks
        batch.advance()


@pytest.mark.parametrize("pool_of", POOLS)
@pytest.mark.parametrize("place", ["first", "last"])
def test_logits_that_are_not_finite_fail_their_line_alone(place: str, pool_of: str, fresh_seed: int) -> None:
    """Also a line that begins as others do: what they share comes before its infinite token."""
    model = small_model("olmoe", "OlmoeForCausalLM", seed=3)
    draw = random.Random(fresh_seed)
    prompts = draw_prompts(draw, 4)
    bad = 2 if place == "first" else 0
    prompts[bad] = [200, *prompts[2]] if place == "first" else [*prompts[1][:COMMON], 200]
    with torch.no_grad():
        model.get_input_embeddings().weight[200] = float("inf")
        model.get_output_embeddings().weight[200] = 0.0  # no answer has that token
    found = run(make_flat(model, 40, FlatLimits(4, 4096), pool_of=pool_of), prompts, draw)
    assert "logits after its" in (found[bad].failure or "")
    for r in found[:bad] + found[bad + 1 :]:
        assert_greedy(model, r)


def test_memory_does_not_grow_with_the_prompts(fresh_seed: int) -> None:
    """2,000 short prompts through a pool that 60 of them fill."""
    draw = random.Random(fresh_seed)
    model = small_model("olmoe", "OlmoeForCausalLM", seed=3)
    batch = make_flat(model, 64, FlatLimits(60, 1024), new=2)
    waiting = [
        RunningSequence(n, [draw.randrange(3, 190) for _ in range(draw.randint(1, 12))], torch.Generator())
        for n in range(2000)
    ]
    ended, resident = 0, []
    while waiting or batch.occupied:
        new, waiting = waiting[: batch.wanted(60)], waiting[batch.wanted(60) :]
        ended += len(batch.begin(new) if new else batch.advance())
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096)
    assert ended == 2000
    assert batch.planner.pool.available == 64
    third = len(resident) // 3
    assert max(resident[third:]) - max(resident[:third]) < 4e6, "bytes"


@pytest.mark.parametrize(
    ("model_type", "name", "reason"),
    [
        ("phimoe", "PhimoeForCausalLM", "its rotary factors depend on the length of the whole text"),
        ("llama4_text", "Llama4ForCausalLM", "its attention has a mask that is neither causal nor a window"),
        ("qwen3_next", "Qwen3NextForCausalLM", "it keeps more than keys and values of the past"),
    ],
)
def test_other_models_are_padded_and_the_log_says_why(
    model_type: str, name: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    holder = loaded(small_model(model_type, name, seed=3))
    with caplog.at_level("INFO", "xpar.models"):
        batch = choose_batch(holder, Sampling(), StopConditions(NEW))
    assert isinstance(batch, DecodeBatch) == holder.is_cache_of_keys_and_values
    assert not isinstance(batch, FlatBatch) and reason in caplog.text
