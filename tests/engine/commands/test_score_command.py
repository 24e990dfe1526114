"""``xpar score`` as a user types it: the same file from any number of ranks, and clear refusals."""

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import mpirun
from moe_families import Case
from tiny_models import END, prompts, write_model

from xpar.engine.cli import parser
from xpar.engine.commands.score import make_request
from xpar.engine.generation.prompts import read_prompts, text_form
from xpar.engine.generation.score import perplexity
from xpar.engine.generation.tokenizer import Tokenizer

XPAR = [sys.executable, "-m", "xpar.engine", "score"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "olmoe"
    write_model(Case("olmoe", "olmoe"), path, torch.bfloat16, 3)
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_exact_scores_are_the_same_on_any_number_of_ranks(
    model: Path, tmp_path: Path, fresh_seed: int
) -> None:
    lines = [json.dumps({"id": n, "text": f"ab{text}"}) for n, text in enumerate(prompts(fresh_seed, 5, 40))]
    lines[1:1] = ['{"text": "x"}', '{"prompt": "x"}', json.dumps({"text": "x" * 9000})]
    lines.append(json.dumps({"context": "What is", "continuation": " this?"}))
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(lines) + "\n")
    written = []
    for n, more in ((1, []), (3, ["--resume"])):
        out = tmp_path / f"{n}.jsonl"
        if more:  # one score is there, and the beginning of another
            out.write_bytes(written[0].splitlines(keepends=True)[1] + b'{"line": 1, ')
        words = [*XPAR, str(model), "--texts", str(file), "--out", str(out), "--exact", *more]
        job = mpirun(n, words)
        assert job.returncode == 0, job.stderr
        assert f"{out}: 6 of 6 texts scored{', 1 of them before' * bool(more)}; 3 lines refused" in job.stdout
        written.append(out.read_bytes())
        told = {entry["line"]: entry["error"] for entry in records(out.with_suffix(".errors.jsonl"))}
        assert "nothing to score" in told[2] and '"text"' in told[3] and "9000 tokens" in told[4]
    assert written[0] == written[1]
    found = records(tmp_path / "1.jsonl")
    tokens, total = sum(r["tokens"] for r in found), sum(r["sum"] for r in found)
    assert found[-1]["token_ids"] == Tokenizer(model).encode(" this?")
    assert (
        f"all scores of the file: {tokens} tokens, perplexity {math.exp(-total / tokens):.4f}" in job.stdout
    )


WRONG = {
    "batch": (["--batch", "0"], "--batch 0: must be at least 1"),
    "exact": (["--exact", "--batch", "2"], "--exact --batch 2: sequences of one batch"),
    "folder": (["--out", "/nowhere/out.jsonl"], "its folder does not exist"),
    "texts": (
        ["--texts", "/nowhere/t.txt"],
        "/nowhere/t.txt: no such file; give a text file or a .jsonl as --texts",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_words(model: Path, tmp_path: Path, what: str) -> None:
    words, message = WRONG[what]
    (tmp_path / "t.txt").write_text("a\n")
    args = parser().parse_args(["score", str(model), "--texts", str(tmp_path / "t.txt"), *words])
    with pytest.raises(ValueError, match=re.escape(message)):
        make_request(args, is_first=True)


def test_a_text_is_whole_or_in_two_parts(tmp_path: Path) -> None:
    file = tmp_path / "t.jsonl"
    good = [
        {"text": "a b"},
        {"context": "", "continuation": "c"},
        {"id": "x", "context": "d", "continuation": " e"},
    ]
    bad = [{"context": "a"}, {"text": "a", "context": "b", "continuation": "c"}, {"text": 3}, ["text"]]
    file.write_text("".join(json.dumps(line) + "\n" for line in [*good, *bad]))
    prompts, refused = read_prompts(file, text_form)
    assert [(p.context, p.text) for p in prompts] == [(None, "a b"), ("", "c"), ("d", " e")]
    assert [(r.line, 'two, "context" and "continuation"' in r.error) for r in refused] == [
        (n, True) for n in range(4, 8)
    ]


def test_a_context_is_cut_before_its_last_spaces(model: Path) -> None:
    tokens = Tokenizer(model)
    for context, text, first in (("ab ", "cd", 2), (None, "cd", 1), ("ab", " cd", 2)):
        ids, place = tokens.encode_pair(context, text)
        assert ids == tokens.encode((context or "") + text) and place == first
    for context in ("", "  "):  # the token that begins texts stands for it
        assert tokens.encode_pair(context, "cd") == ([END - 1, *tokens.encode(f"{context}cd")], 1)


def test_perplexity_is_a_number_or_none() -> None:
    assert perplexity(2, -2.0) == pytest.approx(math.e)
    assert perplexity(0, 0.0) is None and perplexity(1, -1000.0) is None
