"""OpenAI batch files through ``xpar generate`` on one and two ranks, read back by the package ``openai``."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import mpirun
from moe_families import Case
from openai.types import Completion
from openai.types.chat import ChatCompletion
from run_commands import run_commands
from tiny_models import prompts, write_model

DOCUMENTED = """\
{"custom_id": "request-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": \
"gpt-3.5-turbo-0125", "messages": [{"role": "system", "content": "You are a helpful assistant."},{"role": \
"user", "content": "Hello world!"}],"max_tokens": 1000}}
{"custom_id": "request-2", "method": "POST", "url": "/v1/chat/completions", "body": {"model": \
"gpt-3.5-turbo-0125", "messages": [{"role": "system", "content": "You are an unhelpful assistant."},{"role": \
"user", "content": "Hello world!"}],"max_tokens": 1000}}
"""
"""The lines of OpenAI's guide to batches, as they stand there."""
COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
SCHEMA = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": [1, 22]}}}
TALK = [{"role": "user", "content": "hello"}]
MORE = [
    ("plain", COMPLETION, {"model": "m", "prompt": "Hello", "max_tokens": 3, "logprobs": 2, "user": "me"}),
    ("several", CHAT, {"messages": TALK, "n": 3, "temperature": 1.1, "seed": 5, "max_completion_tokens": 4}),
    (
        "listed",
        CHAT,
        {"messages": TALK, "logprobs": True, "top_logprobs": 2, "max_tokens": 3, "stream": False},
    ),
    ("json", CHAT, {"messages": TALK, "response_format": SCHEMA, "max_tokens": 60}),
    ("stream", CHAT, {"messages": TALK, "stream": True}),
    ("picture", CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ("hot", COMPLETION, {"prompt": "a", "temperature": 2.5}),
    ("embed", "/v1/embeddings", {"input": "a"}),
    ("request-1", COMPLETION, {"prompt": "a"}),
]
REFUSED = {
    "stream": "field 'stream' (True) is not supported",
    "picture": "a part of type 'image_url'",
    "hot": "temperature 2.5: must be a number from 0 to 2",
    "embed": "url '/v1/embeddings': must be",
    "request-1": "id 'request-1' is that of line 1",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "olmoe"
    write_model(Case("olmoe", "olmoe"), path, torch.float32, 3, hidden=64)
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Path, str]]:
    """The same file on one and two ranks: ranks -> output file and what was printed."""
    folder = tmp_path_factory.mktemp("batch")
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body})
        for name, url, body in MORE
    ]
    (folder / "b.jsonl").write_text(DOCUMENTED.replace("1000}", "12}") + "\n".join(lines) + "\n{\n")
    done = {}
    for n in (1, 2):
        out = folder / f"{n}.jsonl"
        words = ["generate", str(model), "--prompts", str(folder / "b.jsonl"), "--out", str(out), "--exact"]
        (folder / f"jobs{n}").mkdir()
        first, again, other = run_commands(
            n,
            [words, [*words, "--resume"], [*words, "--resume", "--format", "xpar"]],
            folder / f"jobs{n}",
            timeout=240,
        )
        assert first.returncode == again.returncode == 0, first.stderr + again.stderr
        assert "6 of 6 prompts answered, 6 of them before; 6 lines refused" in again.stdout
        assert other.returncode == 1 and "different: format (openai, now none)" in other.stderr
        done[n] = (out, first.stdout)
    return done


def test_answers_are_read_back_by_the_package_itself(runs: dict[int, tuple[Path, str]], model: Path) -> None:
    out, printed = runs[1]
    assert "in the form of OpenAI's batch output (--format xpar for xpar's own)" in printed
    assert f"lines name the model 'gpt-3.5-turbo-0125', 'm'; {model} answers all of them" in printed
    found = {record["custom_id"]: record for record in records(out)}
    assert [*found] == ["request-1", "request-2", "plain", "several", "listed", "json"]
    for record in found.values():
        assert record["id"].startswith("batch_req_") and record["error"] is None
        assert record["response"]["status_code"] == 200 and record["response"]["request_id"]
    body = {name: record["response"]["body"] for name, record in found.items()}
    chats = {
        name: ChatCompletion.model_validate(body[name], strict=True)
        for name in ("request-1", "request-2", "several", "listed", "json")
    }
    plain = Completion.model_validate(body["plain"], strict=True)
    for chat in chats.values():
        assert chat.object == "chat.completion" and chat.model == str(model) and chat.usage is not None
        assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
        assert all(choice.message.content is not None for choice in chat.choices)
    first = chats["request-1"]
    assert first.choices[0].finish_reason in ("stop", "length") and first.usage
    assert first.choices[0].logprobs is None and first.usage.completion_tokens <= 12
    assert [choice.index for choice in chats["several"].choices] == [0, 1, 2]
    assert len({choice.message.content for choice in chats["several"].choices}) > 1
    listed = chats["listed"].choices[0].logprobs
    assert listed is not None and listed.content is not None and len(listed.content) == 3
    assert all(len(part.top_logprobs) == 2 and part.logprob <= 0 for part in listed.content)
    assert json.loads(chats["json"].choices[0].message.content or "") in (1, 22)
    assert chats["json"].choices[0].finish_reason == "stop"
    tokens = plain.choices[0].logprobs
    assert plain.object == "text_completion" and tokens is not None and plain.usage
    assert tokens.tokens is not None and len(tokens.tokens) == plain.usage.completion_tokens == 3
    assert tokens.top_logprobs is not None and all(2 <= len(top) <= 3 for top in tokens.top_logprobs)


def test_refused_lines_are_errors_with_their_custom_id(runs: dict[int, tuple[Path, str]]) -> None:
    for out, _ in runs.values():
        errors = records(out.with_name(f"{out.stem}.errors.jsonl"))
        assert [record["custom_id"] for record in errors] == [*REFUSED, None]
        assert [record["xpar"]["line"] for record in errors] == [7, 8, 9, 10, 11, 12]
        for record in errors:
            assert record["response"]["status_code"] == 400
            error = record["response"]["body"]["error"]
            assert error["type"] == "invalid_request_error"
            assert REFUSED.get(record["custom_id"], "not JSON") in error["message"]


def test_two_ranks_write_what_one_writes(runs: dict[int, tuple[Path, str]]) -> None:
    def without_time(path: Path) -> list[dict[str, Any]]:
        found = records(path)
        for record in found:
            assert record["response"]["body"].pop("created") > 1_700_000_000
        return found

    assert without_time(runs[1][0]) == without_time(runs[2][0])


KILLER = """
import os, signal, sys
from xpar.engine import cli
from xpar.engine.generation import answer_file, lockstep

def append(self, records):
    whole(self, records)
    if os.path.exists(answer_file.samples_path(self.out)):
        os.kill(os.getpid(), signal.SIGKILL)

whole = answer_file.AnswerFile.append
answer_file.AnswerFile.append = append
lockstep.FLUSH_S = 0.0
sys.exit(cli.main(sys.argv[1:]))
"""
"""xpar that is killed once the first samples are on the disk."""


def test_a_job_killed_between_samples_draws_the_missing_ones(
    model: Path, tmp_path: Path, fresh_seed: int
) -> None:
    line = {"n": 6, "temperature": 1.3, "max_tokens": 8}
    texts = prompts(fresh_seed, 3)
    (tmp_path / "p.jsonl").write_text(
        "".join(
            json.dumps({"id": text + str(k), "prompt": text, **line}) + "\n" for k, text in enumerate(texts)
        )
    )
    out, samples = tmp_path / "out.jsonl", tmp_path / "out.samples.jsonl"
    words = ["generate", str(model), "--prompts", str(tmp_path / "p.jsonl"), "--exact", "--format", "openai"]
    killed = mpirun(2, [sys.executable, "-c", KILLER, *words, "--out", str(out)], timeout=120)
    assert killed.returncode != 0
    before = {(r["hash"], r["sample"]): r["choice"] for r in records(samples)}
    assert 0 < len(before) < 18
    with open(samples, "a") as file:
        file.write('{"hash": "half')
    (tmp_path / "jobs").mkdir()
    fresh = tmp_path / "fresh.jsonl"
    resumed, whole = run_commands(
        2, [[*words, "--out", str(out), "--resume"], [*words, "--out", str(fresh)]], tmp_path / "jobs"
    )
    assert resumed.returncode == whole.returncode == 0, resumed.stderr + whole.stderr
    assert "3 of 3 prompts answered" in resumed.stdout and not samples.exists()

    def texts_of(path: Path) -> list[list[str]]:
        bodies = [record["response"]["body"] for record in records(path)]
        return [[choice["text"] for choice in body["choices"]] for body in bodies]

    assert texts_of(out) == texts_of(fresh)
    drawn = {r["xpar"]["hash"]: texts for r, texts in zip(records(out), texts_of(out), strict=True)}
    assert all(drawn[name][number] == choice["text"] for (name, number), choice in before.items())
