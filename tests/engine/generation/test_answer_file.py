"""Files of answers and of errors: nothing written is lost, and lines end in the order of the prompts."""

import json
from pathlib import Path

import pytest

from xpar.engine.generation.answer_file import (
    AnswerFile,
    errors_path,
    open_answer_file,
    read_answers,
    write_errors,
)
from xpar.engine.generation.prompts import read_prompts


def result(name: str) -> dict[str, str]:
    return {"text": f"{name} \u2028\r\n", "hash": name, "settings": "s"}


def test_answers_survive_a_torn_line_and_come_in_order(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    open_answer_file(out, [result("b")])
    file = AnswerFile(out)
    file.append([result("c"), result("stale")])
    file.close()
    out.write_bytes(out.read_bytes() + b'{"hash": "a", "te')
    kept = read_answers(out, {"a", "b", "c"}, "s")
    assert kept == {"b": result("b"), "c": result("c")}
    open_answer_file(out, kept.values())
    file = AnswerFile(out)
    file.append([result("a")])
    file.finish({"a": 0, "b": 1, "c": 2})
    lines = out.read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == [result("a"), result("b"), result("c")]
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    with pytest.raises(ValueError, match="line 1 was answered with another model"):
        read_answers(out, {"a"}, "other")


def test_no_errors_leave_no_file(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("{\n")
    _, bad = read_prompts(tmp_path / "p.jsonl")
    write_errors(tmp_path / "out.jsonl", bad)
    assert json.loads((tmp_path / "out.errors.jsonl").read_text())["line"] == 1
    write_errors(tmp_path / "out.jsonl", [])
    assert not errors_path(tmp_path / "out.jsonl").exists()
