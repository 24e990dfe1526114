"""Scores of a job are the log-softmax of plain transformers, text by text, however texts are batched."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_models import CLEAR, END, cases, greedy, plain_model, prompts, write_model

from xpar.comm import ProcessGrid, World
from xpar.engine.generation.request import ScoreRequest, read_request
from xpar.engine.generation.score import read_total, score
from xpar.engine.generation.service import Continuations, Prompts, Service
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models import lm_head
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.loader import load_model
from xpar.engine.models.parallelize import SpreadOptions

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=120)
CASES = cases()


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


@pytest.fixture(scope="module")
def root(comm: "Intracomm", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = Path(comm.bcast(str(tmp_path_factory.mktemp("score"))))
    if comm.rank == 0:
        for number, case in enumerate(CASES):
            write_model(case, path / case.name, torch.float32, number)
    comm.barrier()
    yield path


@pytest.fixture
def folder(comm: "Intracomm", tmp_path: Path) -> Path:
    """One folder for all ranks."""
    return Path(comm.bcast(str(tmp_path)))


def lines_of(seed: int, count: int) -> list[dict[str, str]]:
    """Texts of 2 to 40 tokens, every second one in two parts."""
    draw = random.Random(seed)
    texts = [f"{text}.x" for text in prompts(seed, count, 38)]
    cuts = [draw.randint(0, len(text) - 1) for text in texts]
    return [
        {"context": text[:cut], "continuation": text[cut:]} if place % 2 else {"text": text}
        for place, (text, cut) in enumerate(zip(texts, cuts, strict=True))
    ]


@torch.inference_mode()
def by_hand(model: Any, ids: list[int], first: int) -> tuple[torch.Tensor, bool]:
    """The definition: log-probabilities of ids[first:], and whether they are the likeliest."""
    logits = model(torch.tensor([ids])).logits[0, first - 1 : -1].double()
    wanted = torch.tensor(ids[first:])
    return logits.log_softmax(1).gather(1, wanted[:, None])[:, 0], bool((logits.argmax(1) == wanted).all())


def scores(
    world: World, loaded: LoadedModel, model: Path, folder: Path, lines: list[dict[str, str]], **wanted: Any
) -> list[dict[str, Any]]:
    """Records in the order of ``lines``, as read from the file by every rank."""
    file, out = folder / "texts.jsonl", folder / "out.jsonl"
    if world.rank == 0:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        out.unlink(missing_ok=True)
    request = ScoreRequest(model, file, out, **wanted)
    work = read_request(world.comm, request, Tokenizer(model), resume=False)
    outcome = score(world.comm, request, work, loaded)
    results = [json.loads(line) for line in out.read_text().splitlines()]
    total = read_total(world.comm, out)
    assert outcome.complete and outcome.answers == len(lines) == len(results)
    assert total.tokens == outcome.tokens == sum(len(r["logprobs"]) for r in results)
    assert [r["line"] for r in results] == list(range(1, len(lines) + 1))
    world.comm.barrier()
    return results


def compare(
    model: Any, tokens: Tokenizer, lines: list[dict[str, str]], results: list[dict[str, Any]]
) -> None:
    for line, result in zip(lines, results, strict=True):
        context = line.get("context", "")
        ids = tokens.encode(context + line.get("text", line.get("continuation", "")))
        first = max(1, len(context.encode()))  # the tokenizer has one token a byte
        if line.get("context") == "":  # the token that begins texts stands for it
            ids = [END - 1, *ids]
        expected, greedy = by_hand(model, ids, first)
        assert result["token_ids"] == ids[first:]
        assert result["greedy"] == greedy
        assert torch.allclose(torch.tensor(result["logprobs"]).double(), expected, rtol=1e-5, atol=2e-5)
        assert result["sum"] == pytest.approx(float(expected.sum()), rel=1e-5)
        assert result["perplexity"] == pytest.approx(float((-expected.mean()).exp()), rel=1e-4)


@pytest.mark.parametrize("exact", [False, True], ids=["fast", "exact"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_scores_are_those_of_transformers(
    world: World, root: Path, folder: Path, fresh_seed: int, case: Any, exact: bool
) -> None:
    path, lines = root / case.name, lines_of(fresh_seed, 11)
    loaded = load_model(path, ProcessGrid.create(world), options=SpreadOptions(exact=exact))
    results = scores(world, loaded, path, folder, lines, batch=1 if exact else 3, exact=exact)
    if world.rank == 0:
        compare(plain_model(path), Tokenizer(path), lines, results)


@pytest.mark.parametrize("name", ["granitemoe", "gpt_oss", "deepseek_v3"])
def test_long_texts_are_read_in_pieces(
    world: World, root: Path, folder: Path, fresh_seed: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of seven tokens, and the logits of five at a time."""
    path, lines = root / name, lines_of(fresh_seed, 9)
    loaded = load_model(path, ProcessGrid.create(world))
    monkeypatch.setattr(lm_head, "LOGITS_BYTES", 5 * 4 * loaded.model.config.vocab_size + 3)
    shapes: list[int] = []
    whole = lm_head.Head.logits

    def logits(self: lm_head.Head, hidden_states: torch.Tensor) -> torch.Tensor:
        shapes.append(hidden_states.shape[0])
        return whole(self, hidden_states)

    monkeypatch.setattr(lm_head.Head, "logits", logits)
    results = scores(world, loaded, path, folder, lines, batch=2, prefill_tokens=7)
    assert max([s for part in world.comm.all_gather_object(shapes) for s in part]) == 5
    if world.rank == 0:
        compare(plain_model(path), Tokenizer(path), lines, results)


def test_no_texts(world: World, root: Path, folder: Path) -> None:
    loaded = load_model(root / "olmoe", ProcessGrid.create(world))
    assert scores(world, loaded, root / "olmoe", folder, []) == []


def test_one_program_asks_and_the_other_ranks_serve(world: World, root: Path, fresh_seed: int) -> None:
    path, tokens = root / "qwen2_moe", Tokenizer(root / "qwen2_moe")
    service = Service(world.comm, load_model(path, ProcessGrid.create(world)), tokens, 2, 20)
    if world.rank:
        service.serve()
        return
    model, ids = plain_model(path), [tokens.encode(f"ab{text}") for text in prompts(fresh_seed, 7, 30)]
    answers = service.ask(Prompts(tuple(ids), 5))
    sums = service.ask(Continuations(tuple((one, 1 + place % 2) for place, one in enumerate(ids))))
    assert service.ask(Prompts((), 5)) == service.ask(Continuations(())) == []
    service.end()
    for place, one in enumerate(ids):
        expected = greedy(model, one, 5, {END})
        assert expected.gap <= CLEAR or answers[place] == tokens.decode(expected.answer)
        logprobs, likeliest = by_hand(model, one, 1 + place % 2)
        assert sums[place] == (pytest.approx(float(logprobs.sum()), rel=1e-5), likeliest)
