"""Answers of a job are those that plain transformers gives one prompt at a time."""

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from shrunk_families import small_model
from tiny_models import (
    CLEAR,
    END,
    Plain,
    cases,
    greedy,
    plain_model,
    prompts,
    write_model,
    write_tokenizer,
)

from xpar.comm import AgreedError, ProcessGrid, World
from xpar.engine.generation.choose_batch import choose_batch
from xpar.engine.generation.flat_plan import FlatPlan, FlatPlanner
from xpar.engine.generation.generate import RunSummary, generate
from xpar.engine.generation.lengthwise_batch import LengthwiseBatch
from xpar.engine.generation.request import Request, read_request
from xpar.engine.generation.running_sequence import StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.flat_forward import flat_forms
from xpar.engine.models.kv_pool import BLOCK_TOKENS
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.loader import load_model
from xpar.engine.models.parallelize import SpreadOptions

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=120)
CASES = cases()
MOST, PROMPTS = 8, 14
ENDS = frozenset({END, *range(0, END, 6)})
"""So many that answers end at all lengths: slots are refilled one by one, and ranks run out one by one."""
ExpectedOf = Callable[[str, tuple[str, ...], int, frozenset[int]], list[Plain]]


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


@pytest.fixture(scope="module")
def root(comm: "Intracomm", tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(comm.bcast(str(tmp_path_factory.mktemp("generate"))))
    if comm.rank == 0:
        for number, case in enumerate(CASES):
            write_model(case, path / case.name, torch.float32, number)
    comm.barrier()
    return path


@pytest.fixture(scope="module")
def expected_of(root: Path) -> ExpectedOf:
    """Transformers' answers to prompts, each list of prompts once; rank 0 computes them."""

    @cache
    def expected(name: str, texts: tuple[str, ...], most: int, ends: frozenset[int]) -> list[Plain]:
        model, tokens = plain_model(root / name), Tokenizer(root / name)
        return [greedy(model, tokens.encode(text), most, ends) for text in texts]

    return expected


@pytest.fixture
def folder(comm: "Intracomm", tmp_path: Path) -> Path:
    """One folder for all ranks."""
    return Path(comm.bcast(str(tmp_path)))


def answers(
    world: World,
    loaded: LoadedModel,
    model: Path,
    folder: Path,
    texts: list[str],
    ends: frozenset[int] = ENDS,
    **wanted: Any,
) -> tuple[Mapping[int, Any], RunSummary]:
    """Place in ``texts`` -> answer's result, as read from the file by every rank; and the outcome."""
    file, out = folder / "prompts.txt", folder / "out.jsonl"
    if world.rank == 0:
        file.write_text("\n".join(texts) + "\n")
        out.unlink(missing_ok=True)
    settings = {"sampling": Sampling(), "max_new_tokens": MOST, "batch": 3} | wanted
    request = Request(model, file, out, **settings)
    tokens = Tokenizer(model, request.chat)
    tokens.ends = ends
    work = read_request(world.comm, request, tokens, resume=False)
    outcome = generate(world.comm, request, work, tokens, loaded)
    results = [json.loads(line) for line in out.read_text().splitlines()]
    world.comm.barrier()
    assert [r["line"] for r in results] == list(range(1, len(texts) + 1))
    return {r["line"] - 1: r for r in results}, outcome


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_greedy_text_is_that_of_transformers(
    world: World,
    root: Path,
    folder: Path,
    fresh_seed: int,
    expected_of: ExpectedOf,
    case: Any,
    exact: bool,
) -> None:
    """Prompts and answers of different lengths over up to four ranks."""
    path, texts = root / case.name, prompts(fresh_seed, PROMPTS)
    options = SpreadOptions(exact=exact, slice_dense=True)
    loaded = load_model(path, ProcessGrid.create(world), options=options)
    assert not (exact and loaded.slices_dense)
    found, outcome = answers(world, loaded, path, folder, texts, batch=1 if exact else 3, exact=exact)
    assert outcome.complete and outcome.answers == len(texts)
    if world.rank == 0:
        tokens, clear = Tokenizer(path), 0
        plain = expected_of(case.name, tuple(texts), MOST, ENDS)
        for place, (text, expected) in enumerate(zip(texts, plain, strict=True)):
            if expected.gap > CLEAR:
                clear += 1
                assert found[place]["text"] == tokens.decode(expected.answer), text
                assert found[place]["tokens"] == len(expected.answer)
                assert found[place]["finish"] == ("length" if len(expected.answer) == MOST else "end")
        assert clear > PROMPTS // 2
        assert len({result["tokens"] for result in found.values()}) > 1


def test_a_hybrid_reads_prompts_by_length_and_continues_them_together(
    comm: "Intracomm", world: World, root: Path, folder: Path, fresh_seed: int
) -> None:
    """Prompts of different lengths over up to four ranks, of which each continues all of its own at once."""
    path, texts = root / "hybrid", prompts(fresh_seed, PROMPTS)
    if world.rank == 0:
        small_model("qwen3_next", "Qwen3NextForCausalLM", seed=5).save_pretrained(path)
        write_tokenizer(path)
    comm.barrier()
    loaded = load_model(path, ProcessGrid.create(world))
    assert isinstance(choose_batch(loaded, Sampling(), StopConditions(MOST)), LengthwiseBatch)
    found, outcome = answers(world, loaded, path, folder, texts)
    assert outcome.complete and outcome.failed == 0
    if world.rank == 0:
        model, tokens = plain_model(path), Tokenizer(path)
        for place, text in enumerate(texts):
            expected = greedy(model, tokens.encode(text), MOST, ENDS)
            if expected.gap > CLEAR:
                assert found[place]["text"] == tokens.decode(expected.answer), text


@pytest.mark.parametrize("count", [0, 1, 2])
def test_more_ranks_than_prompts(world: World, root: Path, folder: Path, fresh_seed: int, count: int) -> None:
    path = root / "mixtral"
    loaded = load_model(path, ProcessGrid.create(world), options=SpreadOptions(slice_dense=True))
    found, outcome = answers(world, loaded, path, folder, prompts(fresh_seed, count))
    assert outcome.complete and len(found) == count


def test_draws_depend_on_the_prompt_and_the_seed_alone(
    world: World, root: Path, folder: Path, fresh_seed: int
) -> None:
    path, texts = root / "olmoe", prompts(fresh_seed, 7)
    loaded = load_model(path, ProcessGrid.create(world))
    alone = load_model(path, ProcessGrid.create(world, ep=1))
    sampling = Sampling(temperature=1.3, top_k=50, top_p=0.9, seed=fresh_seed)
    together, _ = answers(world, loaded, path, folder, texts, sampling=sampling)
    apart, _ = answers(world, alone, path, folder, texts, sampling=sampling, batch=1)
    other, _ = answers(world, loaded, path, folder, texts, sampling=Sampling(1.3, 50, 0.9, fresh_seed + 1))
    same = sum(together[place]["text"] == apart[place]["text"] for place in together)
    assert same >= 6  # rounding may move one draw across the edge of a probability
    assert any(together[place]["text"] != other[place]["text"] for place in together)


@pytest.mark.parametrize("most", [1, 16, 40])
def test_prompts_read_a_few_tokens_at_a_time_change_nothing(
    world: World, root: Path, folder: Path, fresh_seed: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``most`` tokens of prompts in one forward, and one of each running sequence."""
    path, texts = root / "qwen3_moe", prompts(fresh_seed, 12)
    loaded, read = load_model(path, ProcessGrid.create(world)), []

    def plan(self: FlatPlanner) -> FlatPlan:
        planned = whole(self)
        begun = [s.read < len(s.running.ids) - 1 for s in planned.sequences]
        read.append(sum(count for count, new in zip(planned.counts, begun, strict=True) if new))
        return planned

    together, _ = answers(world, loaded, path, folder, texts, prefill_tokens=10**6)
    whole = FlatPlanner.plan
    monkeypatch.setattr(FlatPlanner, "plan", plan)
    apart, _ = answers(world, loaded, path, folder, texts, prefill_tokens=most)
    assert max(read) <= most
    assert max(read) > most // 2 or world.size > 1  # a rank's share of few prompts may be less
    assert sum(together[place]["text"] == apart[place]["text"] for place in together) >= 11


@pytest.mark.parametrize("blocks", [3, 200], ids=["preempted", "roomy"])
@pytest.mark.parametrize("shares", [True, False], ids=["shared", "unshared"])
def test_common_beginnings_and_little_memory_change_no_text(
    world: World,
    root: Path,
    folder: Path,
    fresh_seed: int,
    expected_of: ExpectedOf,
    shares: bool,
    blocks: int,
) -> None:
    """Against transformers one prompt at a time; a pool of three blocks of 16 tokens drops sequences."""
    path, most = root / "olmoe", 16
    common = "".join(prompts(fresh_seed, 6))[: 16 + fresh_seed % 5]
    texts = [common + text if n % 3 else text for n, text in enumerate(prompts(fresh_seed + 1, PROMPTS))]
    loaded = load_model(path, ProcessGrid.create(world))
    forms = flat_forms(loaded)
    assert not isinstance(forms, str)
    nbytes = blocks * BLOCK_TOKENS * sum(form.nbytes for form in forms)
    options = {"kv_bytes": nbytes, "shares_prefixes": shares, "max_new_tokens": most, "batch": None}
    found, outcome = answers(world, loaded, path, folder, texts, frozenset({END}), **options)
    assert outcome.complete and outcome.failed == 0
    if world.rank == 0:
        tokens, clear = Tokenizer(path), 0
        plain = expected_of("olmoe", tuple(texts), most, frozenset({END}))
        for place, (text, expected) in enumerate(zip(texts, plain, strict=True)):
            if expected.gap > CLEAR:
                clear += 1
                assert found[place]["text"] == tokens.decode(expected.answer), text
        assert clear > PROMPTS // 2


def test_a_stop_in_the_middle_and_a_resume_give_the_same_text(
    world: World, root: Path, folder: Path, fresh_seed: int
) -> None:
    """The last rank is told to stop while sequences run and prompts are read in pieces."""
    path, texts = root / "olmoe", prompts(fresh_seed, PROMPTS)
    loaded = load_model(path, ProcessGrid.create(world))
    whole, _ = answers(world, loaded, path, folder, texts)
    out, polls, tokens = folder / "again.jsonl", [0], Tokenizer(path)
    tokens.ends = ENDS
    request = Request(path, folder / "prompts.txt", out, Sampling(), MOST, batch=3, prefill_tokens=5)

    def stop() -> bool:
        polls[0] += 1
        return world.rank == world.size - 1 and polls[0] == 7

    work = read_request(world.comm, request, tokens, resume=False)
    first = generate(world.comm, request, work, tokens, loaded, stop)
    rest = read_request(world.comm, request, tokens, resume=True)
    assert not first.complete and len(rest.queue) == len(texts) - first.answers > 0
    assert generate(world.comm, request, rest, tokens, loaded).complete
    results = [json.loads(line) for line in out.read_text().splitlines()]
    same = sum(result["text"] == whole[result["line"] - 1]["text"] for result in results)
    assert len(results) == len(texts) and same >= len(texts) - 1  # rounding may turn one near tie


def test_stop_texts_end_answers_and_are_cut(world: World, root: Path, folder: Path, fresh_seed: int) -> None:
    path, texts = root / "olmoe", prompts(fresh_seed, 5)
    loaded = load_model(path, ProcessGrid.create(world))
    options: dict[str, Any] = {"max_new_tokens": 20, "ends": frozenset({END})}
    free, _ = answers(world, loaded, path, folder, texts, **options)
    stop = next(letter for r in free.values() for letter in r["text"][3:] if letter.isascii())
    stopped, _ = answers(world, loaded, path, folder, texts, stops=(stop, "\x00\x01\x02"), **options)
    assert any(r["finish"] == "stop" for r in stopped.values())
    for place, result in free.items():
        cut = result["text"].find(stop)
        if cut >= 0:
            assert stopped[place]["text"] == result["text"][:cut] and stopped[place]["finish"] == "stop"
            assert stopped[place]["tokens"] <= result["tokens"]
        else:
            assert stopped[place]["text"] == result["text"]


def test_a_chat_prompt_goes_through_the_template(
    world: World, root: Path, folder: Path, fresh_seed: int
) -> None:
    path, texts = root / "olmoe", prompts(fresh_seed, 3)
    loaded = load_model(path, ProcessGrid.create(world))
    plain, _ = answers(world, loaded, path, folder, [f"<s>user: {text}" for text in texts])
    chat, _ = answers(world, loaded, path, folder, texts, chat=True)
    tokens, by_hand = Tokenizer(path, chat=True), Tokenizer(path)
    assert tokens.encode("x")[0] == END - 1 and tokens.encode("x") == by_hand.encode(
        "<s>user: x\nassistant: "
    )
    assert [r["text"] for r in chat.values()] != [r["text"] for r in plain.values()]


def test_a_disk_that_refuses_is_one_error(world: World, root: Path, folder: Path) -> None:
    path = root / "mixtral"
    loaded = load_model(path, ProcessGrid.create(world))
    file = folder / "prompts.txt"
    if world.rank == 0:
        file.write_text("a\nb\n")
    request = Request(path, file, folder / "no" / "out.jsonl", Sampling(), MOST)
    tokens = Tokenizer(path)
    with pytest.raises(AgreedError, match="No such file") as caught:
        work = read_request(world.comm, request, tokens, resume=False)
        generate(world.comm, request, work, tokens, loaded)
    assert len(set(world.comm.all_gather_object(str(caught.value)))) == 1
