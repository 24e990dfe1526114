"""The lines of text files in every encoding that users' programs write."""

import codecs
import json
import random
from pathlib import Path

import pytest

from xpar.engine.generation.prompts import prompt_form, read_prompts, text_form
from xpar.engine.generation.text_lines import read_lines

TEXTS = ("hello", "zwei\u2028drei", "的確是上海", "e\u0301 \ufeffinside")


def read(path: Path) -> tuple[list[str], list[int]]:
    prompts, bad = read_prompts(path)
    return [prompt.text for prompt in prompts], [entry.line for entry in bad]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8, 2 * codecs.BOM_UTF8], ids=["none", "mark", "two"])
@pytest.mark.parametrize("last", [True, False], ids=["newline", "open"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_utf8_in_every_form(tmp_path: Path, end: bytes, mark: bytes, last: bool, suffix: str) -> None:
    file = tmp_path / f"p{suffix}"
    lines = [json.dumps({"prompt": t}, ensure_ascii=False) if suffix == ".jsonl" else t for t in TEXTS]
    data = end.join(line.encode() for line in [lines[0], "", "  ", *lines[1:]])
    file.write_bytes(mark + data + (end if last else b""))
    assert read(file) == ([*TEXTS], [])
    file.write_bytes(mark + end + data)  # the mark is alone on its line
    assert read(file) == ([*TEXTS], [])


def test_files_with_marks_can_be_appended_to_each_other(tmp_path: Path) -> None:
    for name, line in (("p.txt", "a"), ("p.jsonl", '{"prompt": "a"}')):
        (tmp_path / name).write_bytes(2 * (codecs.BOM_UTF8 + line.encode() + b"\n"))
        assert read(tmp_path / name) == (["a", "a"], [])


def test_a_file_of_a_mark_alone_is_empty(tmp_path: Path) -> None:
    for data in (b"", codecs.BOM_UTF8, codecs.BOM_UTF8 + b"\r\n", b"\n\n"):
        (tmp_path / "p.txt").write_bytes(data)
        assert read(tmp_path / "p.txt") == ([], [])


OTHERS = {
    "utf-16": "UTF-16",
    "utf-16-le": "UTF-16LE",
    "utf-16-be": "UTF-16BE",
    "utf-32": "UTF-32",
    "utf-32-le": "UTF-32LE",
    "utf-32-be": "UTF-32BE",
}


@pytest.mark.parametrize("encoding", OTHERS)
@pytest.mark.parametrize("count", [1, 50])
def test_another_encoding_is_refused_by_name(
    tmp_path: Path, fresh_seed: int, encoding: str, count: int
) -> None:
    draw = random.Random(fresh_seed)
    file = tmp_path / "p.jsonl"
    texts = ["".join(draw.choices("abc xyz,.", k=draw.randint(8, 30))) for _ in range(count)]
    file.write_bytes("".join(json.dumps({"prompt": text}) + "\n" for text in texts).encode(encoding))
    with pytest.raises(ValueError, match=rf"p\.jsonl: is {OTHERS[encoding]}, and must be UTF-8; convert it"):
        read_lines(file)


@pytest.mark.parametrize("mark", [codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE], ids=["le", "be"])
def test_utf16_without_spaces_or_latin_letters(tmp_path: Path, mark: bytes) -> None:
    """Bytes of newlines are in the middle of characters, such as U+4E0A, and few bytes are NUL."""
    codec = "utf-16-le" if mark == codecs.BOM_UTF16_LE else "utf-16-be"
    (tmp_path / "p.txt").write_bytes(mark + ("的確是上海\n" * 40).encode(codec))
    with pytest.raises(ValueError, match="is UTF-16, and must be UTF-8"):
        read_lines(tmp_path / "p.txt")


def test_a_compressed_file_is_refused_by_name(tmp_path: Path) -> None:
    import gzip

    (tmp_path / "p.jsonl").write_bytes(gzip.compress(random.Random(1).randbytes(5000)))
    with pytest.raises(ValueError, match=r"is compressed \(gzip\), and must be text in UTF-8; unpack it"):
        read_lines(tmp_path / "p.jsonl")


ONE = {
    "nul": (b"a\0b", "byte 1 is NUL"),
    "latin": ("füge".encode("latin-1"), "byte 1 is not UTF-8"),
    "utf-16": (codecs.BOM_UTF16_LE + "ab".encode("utf-16-le"), "byte 3 is NUL"),
    "zeros": (bytes(300), "byte 0 is NUL"),
}


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("what", ONE)
def test_one_line_in_another_encoding_is_refused_alone(tmp_path: Path, what: str, place: int) -> None:
    lines = [b"one", b"two"]
    lines.insert(place, ONE[what][0])
    (tmp_path / "p.txt").write_bytes(b"\n".join(lines))
    prompts, bad = read_prompts(tmp_path / "p.txt")
    assert [prompt.text for prompt in prompts] == ["one", "two"]
    assert [entry.line for entry in bad] == [place + 1] and ONE[what][1] in bad[0].error


JSON = {
    '{"prompt": "a", "id": [[[' + "[" * 900 + "]" * 903 + "}": "must be a text or a whole number",
    '{"prompt": "a", "id": 1e999}': "must be a text or a whole number",
    '{"prompt": "a", "id": ' + "9" * 5000 + "}": "not JSON",
    '{"prompt": null}': 'a text "prompt"',
    '{"prompt": ["a"]}': 'a text "prompt"',
    "null": 'a text "prompt"',
    '{"prompt": "a", "id": "\\udc00"}': "half of a surrogate pair",
    "{'prompt': 'a'}": "not JSON",
    '{"prompt": "a"} {"prompt": "b"}': "not JSON",
}


@pytest.mark.parametrize("line", JSON, ids=lambda line: line[:30])
def test_json_that_is_no_prompt(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text(f'{line}\n{{"prompt": "b"}}\n')
    prompts, bad = read_prompts(tmp_path / "p.jsonl", prompt_form)
    assert [prompt.text for prompt in prompts] == ["b"]
    assert JSON[line] in bad[0].error and len(bad[0].error) < 300


@pytest.mark.parametrize(
    "value", [{"text": "a", "context": 5}, {"text": 5, "context": "a", "continuation": "b"}]
)
def test_a_text_beside_what_is_no_text_is_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps(value) + '\n{"text": "a", "context": null}\n')
    prompts, bad = read_prompts(tmp_path / "t.jsonl", text_form)
    assert [prompt.line for prompt in prompts] == [2] and [entry.line for entry in bad] == [1]
