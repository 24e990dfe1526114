"""A thousand lines that are no prompts, or without an answer, among good ones: none of them ends a job."""

import codecs
import faulthandler
import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from launch import mpirun
from moe_families import Case
from run_commands import run_commands
from safetensors.torch import load_file, save_file
from tiny_models import prompts, write_model
from tokenizers import Tokenizer as FastTokenizer

from xpar.engine.generation.tokenizer import Tokenizer

TwoRanks = tuple[Path, dict[str, "CompletedProcess[str]"]]
GOOD, BAD = 30, 1000
MOST = 4
TEMPLATE = (
    "{% for m in messages %}{% if 'RAISE' in m['content'] %}{{ raise_exception('no such word') }}{% endif %}"
    "{% if 'CALL' in m['content'] %}{{ nothing.at.all() }}{% endif %}"
    "<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokenizer has a token that the model does not; in float16 the token of a tilde overflows."""
    path = tmp_path_factory.mktemp("made") / "olmoe"
    write_model(Case("olmoe", "olmoe"), path, torch.float32, 3, hidden=64)
    tokenizer = FastTokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|extra|>"])
    tilde = tokenizer.encode("~").ids[0]
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][tilde] = 65504.0
    for name in tensors:
        if "o_proj" in name:
            tensors[name] *= 1e4
    save_file(tensors, file)
    return path


def as_json(value: object) -> Callable[[random.Random], bytes]:
    return lambda draw: json.dumps(value).encode()


def asked(text: Callable[[random.Random], str]) -> Callable[[random.Random], bytes]:
    return lambda draw: json.dumps({"prompt": text(draw)}).encode()


def around(draw: random.Random, what: str) -> str:
    letters = "".join(draw.choices("abcxyz ", k=draw.randint(0, 20)))
    cut = draw.randint(0, len(letters))
    return letters[:cut] + what + letters[cut:]


def noise(draw: random.Random) -> bytes:
    return b"\xff" + draw.randbytes(draw.randint(0, 60)).replace(b"\n", b"")


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "noise": noise,
    "latin": lambda draw: json.dumps({"prompt": around(draw, "ü")}, ensure_ascii=False).encode("latin-1"),
    "utf-16": lambda draw: '{"prompt": "a"}'.encode(draw.choice(["utf-16", "utf-16-le", "utf-16-be"])),
    "nul": lambda draw: around(draw, '{"prompt": "\0"}').encode(),
    "torn": lambda draw: b'{"prompt": "abc'[: draw.randint(1, 14)],
    "two": lambda draw: b'{"prompt": "a"}' * 2,
    "deep": lambda draw: b"[" * draw.choice([10, 2000, 90000]),
    "list": as_json(["prompt"]),
    "none": as_json(None),
    "type": lambda draw: json.dumps(
        {"prompt": draw.choice([1, 1.5, True, None, ["a"], {"a": "b"}])}
    ).encode(),
    "id": lambda draw: json.dumps({"id": draw.choice([1.5, True, ["a"], {}]), "prompt": "a"}).encode(),
    "same-id": lambda draw: json.dumps({"id": "twice", "prompt": around(draw, "")}).encode(),
    "surrogate": lambda draw: b'{"prompt": "a\\udc80"}',
    "digits": lambda draw: b'{"prompt": "a", "id": %s}' % (b"9" * 5000),
    "long": asked(lambda draw: "x" * draw.randint(5000, 9000)),
    "unknown": asked(lambda draw: around(draw, "<|extra|>")),
    "raises": asked(lambda draw: around(draw, "RAISE")),
    "calls": asked(lambda draw: around(draw, "CALL")),
    "field": lambda draw: json.dumps({"prompt": "a", draw.choice(["temprature", "x y", ""]): 1}).encode(),
    "range": lambda draw: json.dumps({"prompt": "a", "top_p": draw.choice([0, 2, "1", [], True])}).encode(),
    "talk": lambda draw: json.dumps({"messages": draw.choice([[], "a", [1], [{"role": "user"}]])}).encode(),
    "batch": lambda draw: json.dumps({"custom_id": draw.choice([1, "", "a"]), "body": {}}).encode(),
    "overflows": asked(lambda draw: around(draw, "~")),
}


def write_lines(path: Path, seed: int) -> tuple[list[str], dict[int, str]]:
    """Write good and bad lines in random order.

    The ids of the good ones, and line -> kind of the bad ones.
    """
    draw = random.Random(seed)
    texts = prompts(seed, GOOD)
    good = [json.dumps({"id": f"good{n}", "prompt": text}).encode() for n, text in enumerate(texts)]
    kinds = [*KINDS, *draw.choices([*KINDS], k=BAD - len(KINDS))]
    entries = [("", line) for line in good] + [(kind, KINDS[kind](draw)) for kind in kinds]
    entries.insert(0, ("", b'{"id": "twice", "prompt": "first"}'))
    rest = entries[1:]
    draw.shuffle(rest)
    lines: list[bytes] = []
    bad: dict[int, str] = {}
    ids = []
    for kind, line in [entries[0], *rest]:
        lines += [b""] * (draw.random() < 0.1) + [line + b"\r" * (draw.random() < 0.1)]
        if kind:
            bad[len(lines)] = kind
        else:
            ids.append(json.loads(line)["id"])
    path.write_bytes(codecs.BOM_UTF8 * draw.randint(0, 1) + b"\n".join(lines) + b"\n" * draw.randint(0, 1))
    return ids, bad


def words_of(model: Path, file: Path, out: Path, *more: str) -> list[str]:
    words = [
        "generate",
        str(model),
        "--prompts",
        str(file),
        "--out",
        str(out),
        "--chat",
        "--dtype",
        "float16",
    ]
    return [*words, "--max-new-tokens", str(MOST), "--exact", *more]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def first_line_of(file: Path) -> int:
    """The number of the first line that is not empty; an empty one may come before it."""
    lines = file.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    return next(n for n, line in enumerate(lines, start=1) if line.strip())


def check(file: Path, out: Path, ids: Sequence[str], bad: dict[int, str], alone: dict[str, str]) -> None:
    """Every good line is answered, as without the bad ones; every bad one is told once."""
    found = records(out)
    assert [record["id"] for record in found] == [*ids]
    assert {record["id"]: record["text"] for record in found} == alone
    errors = records(out.with_name(f"{out.name.removesuffix('.jsonl')}.errors.jsonl"))
    assert [record["line"] for record in errors] == sorted(bad)
    for record in errors:
        expected = {
            "unknown": "is one of the tokenizer's alone",
            "raises": "the chat template or the tokenizer does not take it (TemplateError: no such word)",
            "calls": "the chat template or the tokenizer does not take it (UndefinedError",
            "overflows": "not finite in float16",
            "long": "shorten it",
            "same-id": f"id 'twice' is that of line {first_line_of(file)};",
            "nul": "is NUL",
            "field": "is unknown;",
            "range": "must be a number above 0 and at most 1",
            "talk": "messages",
        }.get(bad[record["line"]], "")
        assert expected in record["error"], bad[record["line"]]


KILLER = """
import os, signal, sys
from xpar.engine import cli
from xpar.engine.generation import answer_file as results

def append(self, records):
    whole(self, records)
    if records:
        os.kill(os.getpid(), signal.SIGKILL)

whole = results.AnswerFile.append
results.AnswerFile.append = append
sys.exit(cli.main(sys.argv[1:]))
"""
"""xpar that is killed once the first answers are written."""


@pytest.fixture(scope="module")
def lines(
    model: Path, tmp_path_factory: pytest.TempPathFactory, fresh_seed: int
) -> tuple[Path, list[str], dict[int, str], dict[str, str]]:
    """The file.

    Ids of good lines, kinds of bad ones, and what answers the good ones where there are no others.
    """
    folder = tmp_path_factory.mktemp("lines")
    ids, bad = write_lines(folder / "all.jsonl", fresh_seed)
    whole = (folder / "all.jsonl").read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    (folder / "good.jsonl").write_bytes(
        b"\n".join(line for n, line in enumerate(whole, start=1) if n not in bad)
    )
    (folder / "jobs").mkdir()
    [job] = run_commands(1, [words_of(model, folder / "good.jsonl", folder / "good.out")], folder / "jobs")
    assert job.returncode == 0 and "refused" not in job.stdout, job.stderr
    alone = {record["id"]: record["text"] for record in records(folder / "good.out")}
    return folder / "all.jsonl", ids, bad, alone


@pytest.mark.parametrize("n", [1, 2])
def test_no_line_ends_a_job(
    model: Path, tmp_path: Path, lines: tuple[Path, list[str], dict[int, str], dict[str, str]], n: int
) -> None:
    file, ids, bad, alone = lines
    out = tmp_path / "out.jsonl"
    program = [sys.executable, "-c", KILLER, *words_of(model, file, out)]
    killed = mpirun(n, program, timeout=120)
    assert killed.returncode != 0
    assert len(records(out)) + sum("hash" in r for r in records(tmp_path / "out.errors.jsonl")) > 0
    (tmp_path / "jobs").mkdir()
    resumed, again, fresh = run_commands(
        n,
        [
            words_of(model, file, out, "--resume"),
            words_of(model, file, out, "--resume"),
            words_of(model, file, tmp_path / "fresh.jsonl"),
        ],
        tmp_path / "jobs",
    )
    overflows = sum(kind == "overflows" for kind in bad.values())
    for job in (resumed, again, fresh):
        assert job.returncode == 0, job.stderr
        text = f"{len(bad) - overflows} lines refused, {overflows} failed in the model, see"
        assert f"{GOOD + 1} of {GOOD + 1 + overflows} prompts answered" in job.stdout and text in job.stdout
    assert "tokens/s" not in again.stdout
    check(file, out, ids, bad, alone)
    check(file, tmp_path / "fresh.jsonl", ids, bad, alone)


@pytest.fixture(scope="module")
def two_ranks(model: Path, tmp_path_factory: pytest.TempPathFactory) -> TwoRanks:
    """Commands on files of texts, of prompts that the model fails on, and with impossible words."""
    # On a busy machine they take longer than pytest lets a test be silent; they have a limit of their own.
    faulthandler.cancel_dump_traceback_later()
    folder = tmp_path_factory.mktemp("two")
    lines = [{"text": text} for text in ("good one", "a ~ b", "bad <|extra|>", "x", "another", "~", "much ~")]
    (folder / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"text": 5}]))
    score = ["score", str(model), "--texts", str(folder / "t.jsonl"), "--dtype", "float16"]
    (folder / "p.txt").write_text("~\na~\n")
    answer = ["generate", str(model), "--prompts", str(folder / "p.txt"), "--dtype", "float16"]
    (folder / "a.errors.jsonl").write_text('{"prompt": "a"}\n')
    (folder / "wide.txt").write_bytes("hello\nthe end\n".encode("utf-16"))
    base, room = ["generate", str(model), "--prompts"], str(Tokenizer(model).positions)
    commands = {
        "score": score,
        "score again": [*score, "--resume"],
        "score blocks": [*score, "--whole-block", "--out", str(folder / "block.jsonl")],
        "answer": answer,
        "answer again": [*answer, "--resume"],
        "no room": [
            *base,
            str(folder / "a.errors.jsonl"),
            "--max-new-tokens",
            room,
        ],
        "over": [*base, str(folder / "a.errors.jsonl"), "--out", str(folder / "a.jsonl")],
        "wide": [*base, str(folder / "wide.txt")],
    }
    (folder / "jobs").mkdir()
    done = run_commands(2, [*commands.values()], folder / "jobs", timeout=240)
    return folder, dict(zip(commands, done, strict=True))


def test_texts_that_cannot_be_scored_end_no_job(two_ranks: TwoRanks) -> None:
    folder, jobs = two_ranks
    one, again, whole = (jobs[name] for name in ("score", "score again", "score blocks"))
    assert whole.returncode == 0, whole.stderr
    assert [r["line"] for r in records(folder / "block.jsonl")] == [1, 5, 7]
    assert one.returncode == again.returncode == 0, one.stderr
    found, errors = records(folder / "t.scores.jsonl"), records(folder / "t.scores.errors.jsonl")
    # A tilde that ends a text is read by nobody.
    assert [r["line"] for r in found] == [1, 5, 7] and [r["line"] for r in errors] == [2, 3, 4, 6, 8]
    assert "3 of 4 texts scored" in one.stdout and "4 lines refused, 1 failed in the model" in one.stdout
    assert "1 failed in the model" in again.stdout


def test_a_model_that_answers_nothing_is_an_error(two_ranks: TwoRanks) -> None:
    folder, jobs = two_ranks
    for job in (jobs["answer"], jobs["answer again"]):
        assert job.returncode == 1
        assert job.stderr.count("the model failed on all of 2 lines that it was given, see ") == 1
    assert [r["line"] for r in records(folder / "p.answers.errors.jsonl")] == [1, 2]


def test_answers_of_two_models_do_not_mix(model: Path, tmp_path: Path) -> None:
    """Whatever of the checkpoint's files differs is named, and no file changes."""
    other = tmp_path / "other"
    shutil.copytree(model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, other / "model.safetensors")
    edited = tmp_path / "edited"
    shutil.copytree(model, edited)
    (edited / "generation_config.json").write_text('{"eos_token_id": [1, 257]}')
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": 1}\n')
    out = tmp_path / "out.jsonl"
    words = [words_of(path, tmp_path / "p.jsonl", out) for path in (model, other, edited)]
    (tmp_path / "jobs").mkdir()
    [first] = run_commands(1, words[:1], tmp_path / "jobs")
    assert first.returncode == 0, first.stderr
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": 2}\n{"prompt": "b"}\n{"prompt": 3}\n')
    before = {path.name: path.read_bytes() for path in tmp_path.glob("out*")}
    changes = [[*words[1], "--resume"], [*words[2], "--resume"], [*words[0], "--resume", "--stop", "x"]]
    changes.append([*words[0], "--resume", "--max-new-tokens", "9"])
    for job, what in zip(
        run_commands(2, changes, tmp_path / "jobs"),
        ("different: weights.", "generation-config", "different: stop.", "max-new-tokens (4, now 9)."),
        strict=True,
    ):
        assert job.returncode == 1 and job.stderr.count("line 1 was answered with another model") == 1
        assert what in job.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.glob("out*")} == before


def test_words_that_leave_no_room_or_no_file(model: Path, two_ranks: TwoRanks) -> None:
    folder, jobs = two_ranks
    positions = Tokenizer(model).positions
    assert positions is not None
    for name, message in {
        "no room": f"--max-new-tokens {positions}: the model has {positions} positions for prompt and answer "
        f"together; give at most {positions - 1}",
        "over": "a.errors.jsonl: refused lines would be written over --prompts",
        "wide": "wide.txt: is UTF-16, and must be UTF-8; convert it (iconv",
    }.items():
        assert jobs[name].returncode == 1 and jobs[name].stderr.count(message) == 1, jobs[name].stderr
    assert (folder / "a.errors.jsonl").read_text() == '{"prompt": "a"}\n'
