"""Lines with fields of their own are answered by their definition, on any ranks and beside any neighbours."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import torch
from tiny_models import END, cases, plain_model, prompts, write_model

from xpar.comm import ProcessGrid, World
from xpar.engine.generation.answer_options import RunOptions
from xpar.engine.generation.generate import generate
from xpar.engine.generation.generation_defaults import ModelDefaults
from xpar.engine.generation.request import Request, hash_of, read_request
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.token_choice import NO_TOKEN
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.loader import load_model

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=120)
MOST = 6
ENDS = frozenset({END, *range(0, END, 9)})
"""So many that answers end at all lengths."""
Line = dict[str, Any]
WAYS: list[Line] = [{}, {"temperature": 1.0}, {"n": 2, "temperature": 2}]


@pytest.fixture(scope="module")
def world(comm: "Intracomm") -> World:
    return World.attach(comm)


@pytest.fixture(scope="module")
def model(comm: "Intracomm", tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(comm.bcast(str(tmp_path_factory.mktemp("fields")))) / "olmoe"
    if comm.rank == 0:
        write_model(next(case for case in cases() if case.model_type == "olmoe"), path, torch.float32, 3)
    comm.barrier()
    return path


@pytest.fixture
def folder(comm: "Intracomm", tmp_path: Path) -> Path:
    """One folder for all ranks."""
    return Path(comm.bcast(str(tmp_path)))


def answer(
    world: World,
    model: Path,
    folder: Path,
    lines: list[Line],
    ep: int | None = None,
    ends: frozenset[int] = frozenset({END}),
    **wanted: Any,
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The results of ``lines`` and those of errors, read by every rank."""
    file, out = folder / "in.jsonl", folder / "out.jsonl"
    errors = folder / "out.errors.jsonl"
    if world.rank == 0:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        out.unlink(missing_ok=True)
    settings = {"sampling": Sampling(), "max_new_tokens": MOST, "batch": 3} | wanted
    request = Request(model, file, out, **settings)
    tokens = Tokenizer(model)
    tokens.ends = ends
    work = read_request(world.comm, request, tokens, resume=False)
    loaded = load_model(model, ProcessGrid.create(world, ep=ep))
    assert generate(world.comm, request, work, tokens, loaded).complete
    read = [path.read_text().splitlines() if path.exists() else [] for path in (out, errors)]
    world.comm.barrier()
    found, refused = ([json.loads(line) for line in part] for part in read)
    return found, refused


def encode(tokens: Tokenizer, line: Line) -> list[int]:
    return tokens.encode_messages(line["messages"]) if "messages" in line else tokens.encode(line["prompt"])


@torch.inference_mode()
def reference(model: Any, tokens: Tokenizer, line: Line, sample: int = 0) -> list[int]:
    """The tokens of the answer to ``line`` by the definitions: the whole text again for each of them."""
    ids = encode(tokens, line)
    way = Sampling(
        line.get("temperature", 0.0), line.get("top_k", 0), line.get("top_p", 1.0), line.get("seed", 0)
    )
    generator = way.generator(hash_of(ids) + (f":{sample}" if sample else ""))
    answer = list[int]()
    while len(answer) < line.get("max_tokens", MOST):
        logits = model(torch.tensor([[*ids, *answer]])).logits[0, -1:].float()
        for token in set(answer):
            logits[0, token] -= answer.count(token) * line.get("frequency_penalty", 0.0)
            logits[0, token] -= line.get("presence_penalty", 0.0)
        token = way.choose(logits, [generator])[0]
        if token in tokens.ends and not line.get("ignore_eos"):
            break
        answer.append(token)
        if any(stop in tokens.decode(answer) for stop in line.get("stop", [])):
            break
    return answer


def lines_of(seed: int) -> list[Line]:
    """Lines with every combination of neighbours: greedy and drawn, short and long, texts and messages."""
    texts = prompts(seed, 9)
    lines: list[Line] = [{"prompt": text} for text in texts[:2]]
    lines += [{"prompt": text, "max_tokens": 2 + n} for n, text in enumerate(texts[2:4])]
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": texts[4]}]
    lines += [{"messages": talk}, {"messages": talk, "max_tokens": 9, "stop": ["e", "a"]}]
    draws = [{"temperature": 1.0}, {"temperature": 1.7, "top_k": 9}, {"temperature": 0.5, "top_p": 0.6}]
    for n, way in enumerate(draws):
        lines += [{"prompt": texts[5 + n], "seed": seed % 1000 + n, **way}] * 2
    lines += [{"prompt": texts[8], "frequency_penalty": 1.5, "presence_penalty": -0.5, "max_tokens": 12}]
    lines += [{"prompt": texts[8], "presence_penalty": 2, "max_tokens": 12, "temperature": 1.2, "seed": 3}]
    lines += [{"prompt": texts[8], "repetition_penalty": 1.0, "ignore_eos": True, "max_tokens": 12}]
    return [{"id": n, **line} for n, line in enumerate(lines)]


def test_every_line_is_answered_by_its_fields(
    world: World, model: Path, folder: Path, fresh_seed: int
) -> None:
    lines = lines_of(fresh_seed)
    together, refused = answer(world, model, folder, lines, ends=ENDS)
    alone, _ = answer(world, model, folder, lines, ep=1, batch=1, ends=ENDS)
    assert refused == [] and [result["id"] for result in together] == [line["id"] for line in lines]
    if world.rank == 0:
        plain, tokens = plain_model(model), Tokenizer(model)
        tokens.ends = ENDS
        expected = [reference(plain, tokens, line) for line in lines]
        assert len(expected[-1]) == 12 and any(len(r["token_ids"]) < MOST for r in together)
        # Rounding may move one draw across the edge of a probability.
        for found in (together, alone):
            same = [r["token_ids"] == answer for r, answer in zip(found, expected, strict=True)]
            assert sum(same) >= len(lines) - 2, same
    # The same prompt with the same seed, on another line and with another id.
    for n in (6, 8, 10):
        assert together[n]["token_ids"] == together[n + 1]["token_ids"]


def test_a_line_that_does_not_fit_is_refused_alone(world: World, model: Path, folder: Path) -> None:
    room = Tokenizer(model).positions
    lines = [{"prompt": "a"}, {"prompt": "b", "max_tokens": room}, {"prompt": "c", "temperature": 3}]
    lines.append({"prompt": "d", "top_p": 0.5})
    found, refused = answer(world, model, folder, lines)
    assert [result["line"] for result in found] == [1]
    assert [result["line"] for result in refused] == [2, 3, 4]
    assert f"besides max_tokens {room}; shorten it" in refused[0]["error"]
    assert "temperature 3: must be" in refused[1]["error"]
    assert "give the line a temperature" in refused[2]["error"]


def test_a_line_without_a_token_to_take_fails_alone(
    world: World, model: Path, folder: Path, fresh_seed: int
) -> None:
    """Its neighbours in the batch, before and behind it, go on to their ends."""
    banned = RunOptions(ModelDefaults(), {"suppress_tokens": [*range(END + 1)]}, MOST)
    lines: list[Line] = [{"prompt": text} for text in prompts(fresh_seed, 7)]
    plain, _ = answer(world, model, folder, lines)
    for stuck in (1, 4):
        lines[stuck]["max_tokens"] = 3
    found, failed = answer(world, model, folder, lines, options=banned)
    assert [(result["line"], result["error"]) for result in failed] == [(2, NO_TOKEN), (5, NO_TOKEN)]
    left = [result["token_ids"] for n, result in enumerate(plain) if n not in (1, 4)]
    assert sum(result["token_ids"] == ids for result, ids in zip(found, left, strict=True)) >= 4


def test_log_probabilities_are_those_of_transformers(
    world: World, model: Path, folder: Path, fresh_seed: int
) -> None:
    """Of the model alone, whatever temperature and penalties; in the form of the line's API."""
    texts = prompts(fresh_seed, 3)
    way: Line = {"temperature": 0.7, "seed": 4, "frequency_penalty": 1.0}
    lines: list[Line] = [{"prompt": texts[0], "logprobs": 2}, {"prompt": texts[1], "logprobs": 0, **way}]
    talk = [{"role": "user", "content": texts[2]}]
    lines += [{"messages": talk, "logprobs": True, "top_logprobs": 3, **way}, {"prompt": texts[0]}]
    found, _ = answer(world, model, folder, lines)
    if world.rank:
        return
    plain, tokens = plain_model(model), Tokenizer(model)
    for result, line in zip(found[:3], lines, strict=False):
        ids, drawn = encode(tokens, line), result["token_ids"]
        with torch.inference_mode():
            whole = plain(torch.tensor([[*ids, *drawn]])).logits[0].float().log_softmax(-1)
        places = whole[len(ids) - 1 : -1]
        wanted = [float(place[token]) for place, token in zip(places, drawn, strict=True)]
        made = result["logprobs"]
        if "messages" in line:
            assert [part["logprob"] for part in made["content"]] == pytest.approx(wanted, abs=1e-4)
            tops = [[top["logprob"] for top in part["top_logprobs"]] for part in made["content"]]
        else:
            assert made["token_logprobs"] == pytest.approx(wanted, abs=1e-4)
            tops = [sorted(top.values())[::-1][:2] for top in made["top_logprobs"] or []]
        for top, place in zip(tops, places, strict=bool(tops)):
            assert top == pytest.approx(place.sort(descending=True)[0][: len(top)].tolist(), abs=1e-4)
    assert found[1]["logprobs"]["top_logprobs"] is None and "logprobs" not in found[3]


def test_samples_are_answers_of_their_own_in_one_record(
    world: World, model: Path, folder: Path, fresh_seed: int
) -> None:
    text = prompts(fresh_seed, 1)[0]
    lines: list[Line] = [{"id": "many", "prompt": text, "n": 5, "temperature": 1.2, "seed": fresh_seed % 99}]
    lines += [{key: value for key, value in lines[0].items() if key != "n"} | {"id": "one"}]
    lines += [{"id": "few", "prompt": text, "n": 2, "temperature": 1.2, "seed": fresh_seed % 99}]
    many, one, few = answer(world, model, folder, lines)[0]
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3, 4]
    ids = [choice["token_ids"] for choice in many["choices"]]
    assert len({*map(tuple, ids)}) > 1
    # More samples do not change the first ones, and the first is the answer of a line with one.
    assert one["token_ids"] == ids[0] and [choice["token_ids"] for choice in few["choices"]] == ids[:2]
    if world.rank == 0:
        plain, tokens = plain_model(model), Tokenizer(model)
        expected = [reference(plain, tokens, lines[0], sample) for sample in range(5)]
        assert sum(a == b for a, b in zip(ids, expected, strict=True)) >= 4
        assert not (folder / "out.samples.jsonl").exists()


def test_an_answer_follows_its_schema(world: World, model: Path, folder: Path, fresh_seed: int) -> None:
    schema = {
        "type": "object",
        "properties": {
            "age": {"type": "integer", "minimum": 0, "maximum": 9},
            "who": {"enum": ["me", "you"]},
        },
        "required": ["age", "who"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    lines: list[Line] = [
        {"prompt": text, "response_format": wanted, "max_tokens": 400, **way}
        for text, way in zip(prompts(fresh_seed, 3), WAYS, strict=True)
    ]
    lines.append(
        {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}}
    )
    lines.append({"prompt": "a", "ignore_eos": True, "response_format": wanted})
    found, refused = answer(world, model, folder, lines)
    for result in [found[0], found[1], *found[2]["choices"]]:
        assert result["finish"] == "end"
        jsonschema.validate(json.loads(result["text"]), schema)
    assert [result["line"] for result in refused] == [4, 5]
    assert "the JSON schema cannot be followed" in refused[0]["error"]
    assert "leave one of them out" in refused[1]["error"]
