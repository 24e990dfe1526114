"""``xpar bench generate --workload``: all sides answer the same prompts, and the figures are of them."""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from launch import mpirun
from moe_families import Case
from run_commands import run_commands
from tiny_models import write_model

from xpar.engine.bench.workload import COMMON_TOKENS, MIXED_TOKENS, SHARES, StepClock, compare, draw_mixed
from xpar.engine.bench.workload_peers import (
    CONTINUOUS,
    PADDED,
    PADDED_ROWS,
    answer_by_vllm,
    answer_continuously,
    answer_padded,
    contend_on_gpu,
)
from xpar.engine.cli import parser
from xpar.engine.commands.bench_generate import check_request
from xpar.engine.generation.lockstep import Progress

STAND_IN = Path(__file__).parents[2] / "support/stand_in_vllm"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "olmoe"
    write_model(Case("olmoe", "olmoe"), path, torch.float32, 3)
    return path


def test_the_mixed_workload_is_what_it_says() -> None:
    for seed in (0, 5):
        prompts = draw_mixed(32000, seed)
        lengths = [len(ids) for ids in prompts]
        assert len(prompts) == 96 and min(lengths) >= 16 and max(lengths) <= 840
        assert abs(sum(lengths) - MIXED_TOKENS) < 96
        ((begin, times),) = Counter(tuple(ids[:COMMON_TOKENS]) for ids in prompts).most_common(1)
        assert times == 32 and len(begin) == COMMON_TOKENS
        assert all(0 <= token < 32000 for ids in prompts for token in ids)
        assert prompts == draw_mixed(32000, seed)
    assert draw_mixed(32000, 1) != draw_mixed(32000, 2)


@pytest.mark.parametrize("ranks", [1, 2])
def test_all_sides_answer_the_same(
    model: Path, tmp_path: Path, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a", "the same beginning, and one end", "the same beginning, and another", "b c d e f", "xyz"]
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f"{text}\n" for text in texts))
    # A program that starts Python with the stand-in in its path.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={STAND_IN} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    words = ["--workload", str(file), "--new-tokens", "6", "--peer-python", str(python), "--rows", "3"]
    words += ["--threads", "1"]
    command = [sys.executable, "-m", "xpar.engine", "bench", "generate", str(model), *words]
    job = mpirun(ranks, [*command, "--json", str(tmp_path / "figures.json")], timeout=550)
    assert job.returncode == 0, job.stderr + job.stdout
    document = json.loads((tmp_path / "figures.json").read_text())
    results = document["results"]
    assert {"xpar", "vLLM", "vLLM, no prefix cache"} < set(results)
    assert any(name.startswith("transformers, ") for name in results)
    for name, r in results.items():
        assert r["same"] == r["same_first"] == 5, name
        assert 0 < r["first_s"] <= r["seconds"] and min(r["peak_bytes"]) > 2**20
        assert r["new_tokens_per_s"] == pytest.approx(5 * 6 / r["seconds"])
        assert r["prompt_tokens_per_s"] == pytest.approx(sum(map(len, texts)) / r["seconds"])
        assert r["ratio"] == pytest.approx(r["seconds"] / results["xpar"]["seconds"])
    assert len(results["xpar"]["peak_bytes"]) == ranks
    shares = document["shares_s"]
    assert set(shares) == set(SHARES) and all(seconds > 0 for seconds in shares.values())
    assert shares["reading"] + shares["decoding"] <= results["xpar"]["seconds"]
    assert shares["attention"] + shares["experts"] < shares["reading"] + shares["decoding"]
    assert "5 prompts of" in job.stdout and "xpar's seconds on rank 0: reading" in job.stdout


def test_both_ways_of_transformers_answer_greedily(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    prompts = [torch.randint(256, (length,)).tolist() for length in (3, 300, 40)]
    expected = []
    for ids in prompts:
        answer: list[int] = []
        for _ in range(5):
            answer.append(int(loaded(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        expected.append(answer)
    for found, first_s in (answer_padded(loaded, prompts, 5), answer_continuously(loaded, prompts, 5, 64)):
        assert found == expected and first_s is not None and first_s > 0


def test_continuous_batching_goes_on_with_what_it_prepared(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache is made once, and gone afterwards; what it knows of other prompts changes no answer."""
    from transformers import AutoModelForCausalLM
    from transformers.generation.continuous_batching import continuous_api

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    made: list[object] = []
    begin = continuous_api.ContinuousBatchingManager.__init__

    def count(self: object, *args: object, **kwargs: object) -> None:
        made.append(self)
        begin(self, *args, **kwargs)

    monkeypatch.setattr(continuous_api.ContinuousBatchingManager, "__init__", count)
    prompts = [torch.randint(256, (length,)).tolist() for length in (3, 300, 40)]
    others = [[(token + 1) % 256 for token in ids] for ids in prompts]
    answer_continuously(loaded, others, 5, 64, keeps=True)
    found, _ = answer_continuously(loaded, prompts, 5, 64, keeps=True)
    assert len(made) == 1
    loaded.destroy_cached_continuous_batching_manager()
    assert found == answer_padded(loaded, prompts, 5)[0]
    answer_continuously(loaded, prompts, 5, 64)
    assert len(made) == 2


LEFT_OUT = (
    "padded batches: left out: 16 prompts took 2.8 s, so that all would take about 90 s, and 10.0 s the "
)
LEFT_OUT += "other way"


class StandInWays:
    """Ways to answer whose seconds are given, on a clock of their own; a first call takes ten times that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch_s: float, continuous_s: float | None) -> None:
        self.now, self.calls = 0.0, []
        self._batch_s, self._continuous_s = batch_s, continuous_s
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def _answer(self, name: str, prompts: list[list[int]], seconds: float) -> tuple[list[list[int]], float]:
        self.now += seconds * (1 if name in [other for other, _ in self.calls] else 10)
        self.calls.append((name, prompts))
        return [ids[:1] for ids in prompts], 0.5

    def padded(self, prompts: list[list[int]], count: int) -> tuple[list[list[int]], float]:
        return self._answer("padded", prompts, self._batch_s * -(-len(prompts) // PADDED_ROWS))

    def continuous(self, prompts: list[list[int]], count: int) -> tuple[list[list[int]], float]:
        if self._continuous_s is None:
            raise RuntimeError("no flash attention")
        return self._answer("continuous", prompts, self._continuous_s)

    def close(self) -> None:
        self.calls.append(("close", []))


@pytest.mark.parametrize(
    ("batch_s", "continuous_s", "sides", "note"),
    [
        (2.8, 10.0, {CONTINUOUS}, LEFT_OUT),
        (0.5, 10.0, {CONTINUOUS, PADDED}, ""),
        (0.1, 10.0, {CONTINUOUS, PADDED}, ""),
        (2.8, None, {PADDED}, "continuous batching: does not run here (RuntimeError: no flash attention)"),
    ],
    ids=["slow batches", "alike", "fast batches", "no continuous batching"],
)  # fmt: skip
def test_on_a_gpu_continuous_batching_is_measured_warm_and_padded_batches_if_it_is_worth_it(
    batch_s: float, continuous_s: float | None, sides: set[str], note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = StandInWays(monkeypatch, batch_s, continuous_s)
    prompts = [[7 + n] * (1 + n * 37 % 501) for n in range(501)]
    results, notes = contend_on_gpu(ways.continuous, ways.close, ways.padded, prompts, 3, 600)
    assert set(results) == sides and [n.removeprefix("transformers, ") for n in notes] == [note] * bool(note)
    if CONTINUOUS in sides:
        assert results[CONTINUOUS]["seconds"] == pytest.approx(continuous_s)
        (_, before), (_, measured) = ways.calls[:2]
        assert measured == prompts and list(map(len, before)) == list(map(len, prompts))
        assert not any(a[0] == b[0] for a, b in zip(before, measured, strict=True))
    if PADDED in sides:
        assert results[PADDED]["seconds"] == pytest.approx(batch_s * 32)
    padded = [given for name, given in ways.calls if name == "padded"]
    assert sorted(map(len, padded[0])) == list(range(243, 259))  # of 501 lengths
    assert len(padded) == 2 + (PADDED in sides)
    assert [name for name, _ in ways.calls][-len(padded) - 1] == "close"


def test_a_peer_that_fails_is_a_reason(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match="nowhere: No such file or directory; name a Python that has vLLM"):
        answer_by_vllm(Path("nowhere"), model, [[1]], 2, torch.float32, 1)
    with pytest.raises(RuntimeError, match="No module named 'vllm'"):
        answer_by_vllm(Path(sys.executable), model, [[1]], 2, torch.float32, 1)
    monkeypatch.setenv("PYTHONPATH", str(STAND_IN))
    monkeypatch.setenv("STAND_IN_FAILS", "1")
    with pytest.raises(RuntimeError, match=r"vLLM ended with status 1:\nno memory for the cache"):
        answer_by_vllm(Path(sys.executable), model, [[1]], 2, torch.float32, 1)


def test_steps_that_read_are_told_from_those_that_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(times)))
    clock = StepClock(begin=0.0)
    for done, drawn, computed in [(0, 0, 12), (0, 2, 2), (1, 4, 1), (2, 5, 0)]:
        clock.poll()
        clock.note_progress(Progress(done, drawn, (0,)))
        if computed:
            clock.count(None, (), {"input_ids": torch.zeros(1, computed, dtype=torch.long)})
    assert [(computed, drawn) for _, computed, drawn in clock.steps] == [(12, 2), (2, 2), (1, 1)]
    assert clock.agreeing == 4 and clock.first_s is not None


def test_answers_are_compared_as_wholes_and_by_their_first_tokens() -> None:
    assert compare([[1, 2], [3, 4], [5]], [[1, 2], [3, 5], [6]]) == {"same": 1, "same_first": 2}


WRONG = {
    "long": (["--workload", "mixed", "--new-tokens", "5000"], "new ones, and the model has positions for"),
    "no file": (
        ["--workload", "nowhere.txt"],
        "--workload nowhere.txt: No such file or directory; give a file that rank 0 can read, or mixed",
    ),
    "sharing": (
        ["--no-prefix-sharing"],
        "--no-prefix-sharing: is for files of prompts; give --workload, too",
    ),
    "empty": (["--workload", "EMPTY"], "holds no prompt; give a file"),
    "bad line": (["--workload", "BAD"], "line 2: "),
    "fields": (["--workload", "FIELDS.jsonl"], "FIELDS.jsonl: line 1: has max_tokens, n, and all sides draw"),
    "messages": (["--workload", "CHAT.jsonl"], "CHAT.jsonl: line 1: has messages, for which"),
    "no tokens": (["--workload", "NO.jsonl"], "NO.jsonl: line 2: the tokenizer makes no tokens of it"),
    "compare": (
        ["--workload", "mixed", "--quantize", "int8", "--compare", "bf16"],
        "--compare bf16: is for sequences of equal length; leave --workload out",
    ),
    "peer": (["--workload", "mixed", "--peer-python", "nowhere"], "--peer-python nowhere: no such program"),
    "rows": (["--workload", "mixed", "--rows", "0"], "--rows 0: must be at least 1"),
}


@pytest.fixture(scope="module")
def refused(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, CompletedProcess[str]]:
    """Every wrong request, by its name, run in one start."""
    folder = tmp_path_factory.mktemp("wrong")
    files = {
        "EMPTY": b"",
        "BAD": b"good\n\xff\xfe\n",
        "FIELDS.jsonl": b'{"prompt": "a", "max_tokens": 3, "n": 2}\n',
        "CHAT.jsonl": b'{"messages": [{"role": "user", "content": "a"}]}\n',
        "NO.jsonl": b'{"prompt": "a"}\n{"prompt": ""}\n',
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    commands = [
        ["bench", "generate", str(model), *(str(folder / w) if w in files else w for w in words)]
        for words, _ in WRONG.values()
    ]
    return dict(zip(WRONG, run_commands(1, commands, folder), strict=True))


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_request_names_the_option(refused: dict[str, CompletedProcess[str]], what: str) -> None:
    job, message = refused[what], WRONG[what][1]
    assert job.returncode == 1 and re.search(re.escape(message), job.stderr + job.stdout), job.stderr
    assert "Errno" not in job.stderr + job.stdout


@pytest.mark.parametrize("words", [["--no-prefix-sharing"], ["--rows", "3"], ["--prefill-tokens", "3"]])
def test_options_of_a_workload_need_one(model: Path, words: list[str]) -> None:
    args = parser().parse_args(["bench", "generate", str(model), *words])
    with pytest.raises(
        ValueError, match=f"^{' '.join(words)}: is for files of prompts; give --workload, too"
    ):
        check_request(args)


def test_a_peer_needs_a_workload(model: Path) -> None:
    args = parser().parse_args(["bench", "generate", str(model), "--peer-python", "python"])
    with pytest.raises(ValueError, match="vLLM answers files; give --workload"):
        check_request(args)
