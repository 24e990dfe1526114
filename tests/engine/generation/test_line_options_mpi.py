"""Lines with fields of their own are answered by their definition, on any ranks and beside any neighbours."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tiny_models import cases, plain_model, prompts, write_model

from xpar.comm import ProcessGrid, World
from xpar.engine.generation.generate import generate
from xpar.engine.generation.request import Request, digest, read_request
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.loader import load_model

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(deadline=120)
MOST = 6
Line = dict[str, Any]


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
    world: World, model: Path, folder: Path, lines: list[Line], ep: int | None = None, **wanted: Any
) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """The records of ``lines`` and those of errors, read by every rank."""
    file, out = folder / "in.jsonl", folder / "out.jsonl"
    errors = folder / "out.errors.jsonl"
    if world.rank == 0:
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        out.unlink(missing_ok=True)
    settings = {"sampling": Sampling(), "max_new_tokens": MOST, "batch": 3} | wanted
    request = Request(model, file, out, **settings)
    tokens = Tokenizer(model)
    work = read_request(world.comm, request, tokens, resume=False)
    loaded = load_model(model, ProcessGrid.create(world, ep=ep))
    assert generate(world.comm, request, work, tokens, loaded).complete
    read = [path.read_text().splitlines() if path.exists() else [] for path in (out, errors)]
    world.comm.barrier()
    found, refused = ([json.loads(line) for line in part] for part in read)
    return found, refused


@torch.inference_mode()
def reference(model: Any, tokens: Tokenizer, line: Line) -> list[int]:
    """The tokens of the answer to ``line`` by the definitions: the whole text again for each token."""
    ids = tokens.encode_messages(line["messages"]) if "messages" in line else tokens.encode(line["prompt"])
    way = Sampling(
        line.get("temperature", 0.0), line.get("top_k", 0), line.get("top_p", 1.0), line.get("seed", 0)
    )
    generator, answer = way.generator(digest(ids)), list[int]()
    while len(answer) < line.get("max_tokens", MOST):
        logits = model(torch.tensor([[*ids, *answer]])).logits[0, -1:].float()
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
    return [{"id": n, **line} for n, line in enumerate(lines)]


def test_every_line_is_answered_by_its_fields(
    world: World, model: Path, folder: Path, fresh_seed: int
) -> None:
    lines = lines_of(fresh_seed)
    together, refused = answer(world, model, folder, lines)
    alone, _ = answer(world, model, folder, lines, ep=1, batch=1)
    assert refused == [] and [record["id"] for record in together] == [line["id"] for line in lines]
    if world.rank == 0:
        plain, tokens = plain_model(model), Tokenizer(model)
        expected = [reference(plain, tokens, line) for line in lines]
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
    assert [record["line"] for record in found] == [1]
    assert [record["line"] for record in refused] == [2, 3, 4]
    assert f"besides max_tokens {room}; shorten it" in refused[0]["error"]
    assert "temperature 3: must be" in refused[1]["error"]
    assert "give the line a temperature" in refused[2]["error"]
