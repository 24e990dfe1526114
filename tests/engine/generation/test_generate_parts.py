"""The parts of ``xpar generate`` that need no ranks, each against a plain statement of what it must do."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from xpar.engine.generation.answer_file import (
    AnswerFile,
    errors_path,
    open_answer_file,
    read_answers,
    write_errors,
)
from xpar.engine.generation.decode_batch import RunningSequence, StopConditions
from xpar.engine.generation.lockstep import deal_prompts
from xpar.engine.generation.prompts import read_prompts
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.tokenizer import first_stop
from xpar.engine.models.growing import GrowingCacheLayer
from xpar.engine.models.kv_cache import KvCache, mask


@given(free=st.lists(st.integers(0, 5), min_size=1, max_size=6), left=st.integers(0, 30))
def test_deal_gives_out_all_that_fits_and_evenly(free: list[int], left: int) -> None:
    parts = deal_prompts(free, left)
    assert sum(parts) == min(left, sum(free))
    assert all(0 <= part <= slots for part, slots in zip(parts, free, strict=True))
    for part, slots in zip(parts, free, strict=True):  # nobody with room is two behind anybody
        assert part == slots or part >= max(parts) - 1


def rows(lengths: list[int], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, length, 3, generator=generator) for length in lengths]


def right_aligned(parts: list[torch.Tensor]) -> KvCache:
    """The definition: zeros on the left up to the longest row."""
    columns = max(part.shape[1] for part in parts)
    keys = torch.zeros(len(parts), 2, columns, 3)
    for row, part in enumerate(parts):
        keys[row, :, columns - part.shape[1] :] = part
    return KvCache(((keys, 2 * keys),), tuple(part.shape[1] for part in parts))


def same(a: KvCache, b: KvCache) -> bool:
    pairs = zip(a.layers, b.layers, strict=True)
    return a.lengths == b.lengths and all(
        torch.equal(x, y) for p, q in pairs for x, y in zip(p, q, strict=True)
    )


@given(
    first=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    second=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    data=st.data(),
)
def test_rows_of_a_cache_come_and_go(first: list[int], second: list[int], data: st.DataObject) -> None:
    a, b = rows(first, 1), rows(second, 2)
    joined = right_aligned(a).join(right_aligned(b))
    assert same(joined, right_aligned(a + b))
    assert [tuple(r.nonzero()[:, 0].tolist()) for r in mask(joined.lengths, joined.columns)] == [
        tuple(range(joined.columns - n, joined.columns)) for n in first + second
    ]
    kept = data.draw(st.lists(st.integers(0, len(a + b) - 1), unique=True).map(sorted))
    selected = joined.select(kept)
    if not kept:
        assert selected is None
    else:
        assert selected is not None and same(selected, right_aligned([(a + b)[row] for row in kept]))


def test_a_model_that_keeps_other_state_is_refused() -> None:
    with pytest.raises(ValueError, match="more than keys and values"):
        KvCache.of(type("Cache", (), {"layers": [object()]})(), (1,))


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


def record(name: str) -> dict[str, str]:
    return {"text": f"{name} \u2028\r\n", "hash": name, "settings": "s"}


def test_answers_survive_a_torn_line_and_come_in_order(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    open_answer_file(out, [record("b")])
    file = AnswerFile(out)
    file.append([record("c"), record("stale")])
    file.close()
    out.write_bytes(out.read_bytes() + b'{"hash": "a", "te')
    kept = read_answers(out, {"a", "b", "c"}, "s")
    assert kept == {"b": record("b"), "c": record("c")}
    open_answer_file(out, kept.values())
    file = AnswerFile(out)
    file.append([record("a")])
    file.finish({"a": 0, "b": 1, "c": 2})
    lines = out.read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == [record("a"), record("b"), record("c")]
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


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 5.0]], dtype=torch.bfloat16)
    sampling = Sampling()
    assert sampling.choose(logits, [sampling.generator("x")] * 2) == [1, 2]
    with pytest.raises(ValueError, match="logits are not finite"):
        sampling.choose(logits * float("nan"), [sampling.generator("x")] * 2)


def test_draws_follow_the_probabilities_that_are_left(fresh_seed: int) -> None:
    """Among the 3 likeliest of 4, those that make up 0.8: by temperature 2 the two first, at 0.57 to 0.43."""
    logits = 2 * torch.tensor([[0.40, 0.30, 0.20, 0.10]]).log()
    sampling = Sampling(temperature=2.0, top_k=3, top_p=0.75, seed=fresh_seed)
    generator = sampling.generator("prompt")
    drawn = [sampling.choose(logits, [generator])[0] for _ in range(4000)]
    assert set(drawn) == {0, 1}
    assert abs(drawn.count(0) / 4000 - 4 / 7) < 0.05
    again = sampling.generator("prompt")
    assert [sampling.choose(logits, [again])[0] for _ in range(50)] == drawn[:50]
    other = sampling.generator("another prompt")
    assert [sampling.choose(logits, [other])[0] for _ in range(50)] != drawn[:50]


def test_a_temperature_near_zero_is_the_likeliest_token() -> None:
    """Logits over such a temperature overflow; a row beside them, whose do not, is drawn as if it were alone."""
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 5.0]])
    sampling = Sampling(temperature=1e-40)
    assert sampling.choose(logits, [sampling.generator("x"), sampling.generator("y")]) == [1, 2]
    mixed = torch.tensor([[0.0, 3.0e38, 1.0], [1.0, 1.5, 2.0]])
    warm = Sampling(temperature=0.5, top_k=2)
    assert torch.equal(warm._warped(mixed)[1], warm._warped(mixed[1:])[0])
    assert warm.choose(mixed, [warm.generator("x"), warm.generator("y")])[0] == 1


def test_limits() -> None:
    def run(limits: StopConditions, tokens: list[int]) -> tuple[list[int], str | None]:
        running = RunningSequence(0, [1], torch.Generator())
        for token in tokens:
            if running.finish is None:
                limits.take(running, token)
        return running.answer, running.finish

    limits = StopConditions(3, frozenset({9}), lambda answer: list(answer[-2:]) == [4, 5])
    assert run(limits, [1, 2, 3, 4]) == ([1, 2, 3], "length")
    assert run(limits, [1, 9, 3]) == ([1], "end")
    assert run(limits, [4, 5, 6]) == ([4, 5], "stop")
    assert run(limits, [1, 2]) == ([1, 2], None)


@pytest.mark.parametrize(("text", "place"), [("abcabd", 2), ("xx", None), ("", None), ("dca", 0)])
def test_first_stop(text: str, place: int | None) -> None:
    assert first_stop(text, ("ca", "dc")) == place


@given(parts=st.lists(st.integers(1, 90), min_size=1, max_size=8))
def test_a_growing_layer_is_the_concatenation(parts: list[int]) -> None:
    """What was handed out before stays as it was."""
    room, whole, old, seen = GrowingCacheLayer(), torch.zeros(2, 3, 0, 4), None, []
    for number, columns in enumerate(parts):
        new = torch.randn(2, 3, columns, 4, generator=torch.Generator().manual_seed(number))
        whole, old = torch.cat([whole, new], dim=2), room.append(old, new)
        assert torch.equal(old, whole)
        seen.append((old, whole))
    assert all(torch.equal(a, b) for a, b in seen)
