"""Files of prompts: lines of text, lines of JSON, and lines that are no prompts."""

from pathlib import Path

import pytest

from xpar.engine.generation.prompts import read_prompts


def test_prompts_of_text(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes('one\r\n\n  \nzwei\u2028drei\n{"prompt": 1}\n'.encode())
    prompts, bad = read_prompts(tmp_path / "p.txt")
    assert [(p.line, p.text) for p in prompts] == [(1, "one"), (4, "zwei\u2028drei"), (5, '{"prompt": 1}')]
    assert not bad


BAD_LINES = {
    "{": "not JSON",
    "[1]": 'a text "prompt"',
    '{"prompt": 3}': 'a text "prompt"',
    '{"prompt": "a", "id": [1]}': "must be a text or a whole number",
    '{"prompt": "a", "id": true}': "must be a text or a whole number",
    '{"prompt": "\\ud800"}': "half of a surrogate pair",
    "[" * 100000: "not JSON",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:20])
def test_what_is_no_prompt_does_not_stop_the_rest(tmp_path: Path, line: str) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a", "id": 7}}\n{line}\n{{"prompt": "b"}}\n')
    prompts, bad = read_prompts(tmp_path / "p.jsonl")
    assert [(p.line, p.key, p.text) for p in prompts] == [(1, "id 7", "a"), (3, "line 3", "b")]
    assert [entry.line for entry in bad] == [2] and BAD_LINES[line] in bad[0].error
