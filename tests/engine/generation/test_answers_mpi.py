"""Answers and scores with tokenizers and generation configs of many kinds: those of transformers alone."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from many_tokenizers import BUILD, END, TURN, VOCAB, write_tokenizer
from moe_families import Case
from tiny_models import SIZES, plain_model

from xpar.comm import ProcessGrid, World
from xpar.engine.generation.detokenizer import BROKEN
from xpar.engine.generation.generate import generate
from xpar.engine.generation.generation_defaults import settle
from xpar.engine.generation.lm_eval import LmEvalAdapter
from xpar.engine.generation.request import Request, ScoreRequest, read_request
from xpar.engine.generation.score import score
from xpar.engine.generation.service import Prompts, Service
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.loader import load_model

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=180, max_size=2)
MOST = 12
TEXTS = ("hello", "what is the answer?", "it", "the end", "two  blanks")
VOCABULARY = VOCAB + 300
CONFIGS: dict[str, dict[str, Any]] = {
    "none": {},
    "ends": {"eos_token_id": [END, TURN, *range(5, VOCABULARY, 9)]},
    "penalty": {"repetition_penalty": 1.5, "eos_token_id": END},
    "encoder": {"encoder_repetition_penalty": 1.4, "encoder_no_repeat_ngram_size": 2},
    "ngrams": {"no_repeat_ngram_size": 1, "suppress_tokens": list(range(40, 90)), "eos_token_id": END},
    "lengths": {"min_new_tokens": 9, "eos_token_id": [END, *range(0, VOCABULARY, 3)]},
    "least": {"min_length": 7, "eos_token_id": [END, *range(0, VOCABULARY, 3)]},
    "forced": {"forced_bos_token_id": 77, "forced_eos_token_id": END, "begin_suppress_tokens": [8, 9]},
    "words": {"bad_words_ids": [[n] for n in range(60, 160)], "sequence_bias": [[[200], 9.0]]},
    "decay": {"exponential_decay_length_penalty": [3, 1.9], "eos_token_id": [END, 9, 11]},
}


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


@pytest.fixture
def folder(comm: "Intracomm", tmp_path: Path) -> Path:
    """One folder for all ranks."""
    return Path(comm.bcast(str(tmp_path)))


def write_model(world: World, path: Path, kind: str, around: str, config: dict[str, Any]) -> None:
    if world.rank == 0:
        case = Case("mixtral", "mixtral", {"eos_token_id": END, "bos_token_id": 1})
        case.write(path, "own", torch.float32, 5, **{**SIZES, "vocab": VOCABULARY})
        write_tokenizer(path, kind, around)
        (path / "generation_config.json").write_text(json.dumps(config))
    world.comm.barrier()


@torch.inference_mode()
def plain_answers(path: Path, ids: list[int], **more: Any) -> list[int]:
    model = plain_model(path)
    whole = model.generate(torch.tensor([ids]), max_new_tokens=MOST, do_sample=False, pad_token_id=0, **more)
    return list(whole[0, len(ids) :].tolist())


def work_on(world: World, path: Path, folder: Path, lines: list[dict[str, str]], **options: Any) -> Any:
    file = folder / "in.jsonl"
    if world.rank == 0:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    world.comm.barrier()
    tokens, out = Tokenizer(path), folder / "out.jsonl"
    if "prompt" in lines[0]:
        generation = settle(tokens.defaults, {"do_sample": False}, MOST)
        stops = (*options.pop("stops", ()), *generation.stops)
        request = Request(path, file, out, generation.sampling, MOST, stops, batch=3, **options)
        work = read_request(world.comm, request, tokens, resume=False)
        generate(world.comm, request, work, tokens, load_model(path, ProcessGrid.create(world)))
    else:
        wanted = ScoreRequest(path, file, out, batch=3)
        work = read_request(world.comm, wanted, tokens, resume=False)
        score(world.comm, wanted, work, load_model(path, ProcessGrid.create(world)))
    errors = out.with_suffix(".errors.jsonl")
    read = [p.read_text().splitlines() if p.exists() else [] for p in (out, errors)]
    world.comm.barrier()
    return [[json.loads(line) for line in part] for part in read]


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_answers_with_a_generation_config(world: World, folder: Path, name: str) -> None:
    write_model(world, folder / "model", "byte-level", "begin", CONFIGS[name])
    found, _ = work_on(world, folder / "model", folder, [{"prompt": text} for text in TEXTS])
    if world.rank == 0:
        tokens = Tokenizer(folder / "model")
        for text, record in zip(TEXTS, found, strict=True):
            expected = plain_answers(folder / "model", tokens.encode(text))
            if expected[-1] in tokens.ends:
                expected.pop()
                assert record["finish"] == "end"
            assert record["token_ids"] == expected and record["tokens"] == len(expected)


@pytest.mark.parametrize("kind", BUILD)
def test_answers_and_stops_of_every_kind_of_tokenizer(
    world: World, folder: Path, fresh_seed: int, kind: str
) -> None:
    path, draw = folder / "model", random.Random(fresh_seed)
    write_model(world, path, kind, draw.choice(("bare", "begin", "both")), {"eos_token_id": None})
    tokens = Tokenizer(path)
    lines = [{"prompt": text} for text in TEXTS]
    free, _ = work_on(world, path, folder, lines)
    for text, record in zip(TEXTS, free, strict=True):
        ids = tokens.encode(text)
        before, whole = tokens.decode(ids), tokens.decode([*ids, *record["token_ids"]])
        if whole.startswith(before):
            assert before + record["text"] == whole
        assert len(record["token_ids"]) == MOST and record["finish"] == "length"
    parts = [r["text"][n : n + 2] for r in free for n in range(len(r["text"]))]
    stop = draw.choice([part for part in parts if BROKEN not in part] or ["e"])
    token = free[0]["token_ids"][draw.randrange(MOST)]
    stopped, _ = work_on(world, path, folder, lines, stops=(stop,), stop_tokens=(str(token),))
    for text, alone, record in zip(TEXTS, free, stopped, strict=True):
        detokenizer, ids = tokens.detokenizer(), tokens.encode(text)
        context = detokenizer.context(ids)

        def reached(
            length: int, answer: list[int] = alone["token_ids"], c: Any = context, d: Any = detokenizer
        ) -> bool:
            texts = (d.decode_answer(c, answer[:length], keep) for keep in (False, True))
            return answer[length - 1] == token or any(stop in text for text in texts)

        length = next((n for n in range(1, MOST + 1) if reached(n)), None)
        assert record["finish"] == ("length" if length is None else "stop")
        assert record["token_ids"] == alone["token_ids"][:length]
        assert stop not in record["text"]


@pytest.mark.parametrize("around", ["bare", "both"])
@pytest.mark.parametrize("kind", ["byte-level", "byte-fallback"])
def test_continuations_are_scored_as_one_forward_scores_them(
    world: World, folder: Path, kind: str, around: str
) -> None:
    path = folder / "model"
    write_model(world, path, kind, around, {})
    pairs = [("what is it? ", "the end"), ("", "hello"), ("the answer is", " forty two"), ("hello", "")]
    lines = [{"context": context, "continuation": text} for context, text in pairs]
    found, errors = work_on(world, path, folder, lines)
    tokens, model = Tokenizer(path), plain_model(path)
    assert [entry["line"] for entry in errors] == [4] and "nothing to score" in errors[0]["error"]
    for record, (context, text) in zip(found, pairs, strict=False):
        head = context.rstrip()
        special = {"add_special_tokens": bool(head)}
        whole = [t for t in tokens.tokenizer(context + text, **special)["input_ids"] if t != END]
        before = [t for t in tokens.tokenizer(head, **special)["input_ids"] if t != END]
        if not head:
            whole, before = [1, *whole], [1]
        with torch.inference_mode():
            logprobs = model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
        wanted = whole[len(before) :]
        values = [float(logprobs[len(before) - 1 + n, token]) for n, token in enumerate(wanted)]
        assert record["token_ids"] == wanted and record["tokens"] == len(wanted)
        assert record["logprobs"] == pytest.approx(values, abs=1e-4)


def test_what_the_harness_asks(world: World, folder: Path) -> None:
    """Without the package itself: pairs, refusals, and answers that stop as its own backend stops."""
    path = folder / "model"
    write_model(world, path, "sentence-piece", "both", {"eos_token_id": None, "repetition_penalty": 1.2})
    tokens = Tokenizer(path)
    service = Service(world.comm, load_model(path, ProcessGrid.create(world)), tokens, 3, 64)
    if world.rank:
        service.serve()
        return
    try:
        _ask(service, path)
    finally:
        service.end()


def _ask(service: Service, path: Path) -> None:
    tokens = service.tokenizer
    answers = LmEvalAdapter(service, str(path))
    context, continuation = answers._encode_pair("what is it? ", "the end")
    assert END not in [*context, *continuation]
    assert tokens.tokenizer.decode(continuation) == "the end"
    ((value, _),) = answers._loglikelihood_tokens([(None, context, continuation)])
    assert value < 0
    long = [7] * (answers.max_length + 1)
    for words, pair in ((("hello wor", "ld"), ([7], [])), (None, ([], [7])), (None, ([7], long))):
        with pytest.raises(ValueError, match="change the task's texts"):
            answers._loglikelihood_tokens([(words, *pair)])
    ids = tokens.encode_open("hello")
    settings = settle(tokens.defaults, {"do_sample": False}, MOST).sampling
    expected = plain_answers(path, ids)
    (text,) = service.ask(Prompts((ids,), MOST, (), settings))
    assert text == tokens.tokenizer.decode(expected, skip_special_tokens=True)
    (text,) = service.ask(Prompts((ids,), MOST, (tokens.decode(expected[3:4]),), settings))
    assert len(text) < len(tokens.tokenizer.decode(expected, skip_special_tokens=True))


def test_the_harness_is_warned_of_a_token_on_both_sides(
    world: World, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing is left of a continuation that has no token of its own, which is then refused."""
    write_model(world, folder / "model", "byte-level", "both", {})
    tokens = Tokenizer(folder / "model")
    answers = LmEvalAdapter(SimpleNamespace(tokenizer=tokens), "model")
    assert tokens.tokenizer.decode(answers._encode_pair("what is", " it")[1]) == " it" and not caplog.records
    whole = tokens.encode_open("the answer is forty two")
    before = tokens.encode_open("the answ")
    assert answers._encode_pair("the answ", "er is forty two")[1] == whole[len(before) :]
    assert answers._encode_pair("hello wor", "ld")[1] == []
    assert len(caplog.records) == 1 and "a token spans" in caplog.text
