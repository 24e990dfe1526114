"""``xpar generate`` as a user types it: the same file from any number of ranks, and nothing is lost."""

import faulthandler
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import mpirun
from moe_families import Case
from run_commands import run_commands
from tiny_models import prompts, write_model

from xpar.engine.checkpoint.tensor_file import CheckpointError
from xpar.engine.cli import parser
from xpar.engine.commands.generate import make_request
from xpar.engine.generation.answer_file import read_answers
from xpar.engine.generation.tokenizer import Tokenizer

XPAR = [sys.executable, "-m", "xpar.engine", "generate"]
MARK = "XPAR_TEST_RANKS"
LINES = 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "olmoe"
    write_model(Case("olmoe", "olmoe"), path, torch.bfloat16, 3, hidden=128)
    return path


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass(frozen=True)
class ExactRuns:
    """Exact answers to a file with bad lines on 1, 2 and 3 ranks, and to a good file on two.

    ``outputs``: number of ranks -> what the command printed. ``file``: the good prompts, ``expected``: their
    answers when nothing happens. ``later``: ``resumed``, a file of these answers, resumed by three ranks as
    it is, and with another seed; and a command with a mistake.
    """

    folder: Path
    outputs: dict[int, str]
    file: Path
    expected: bytes
    resumed: Path
    later: list["subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def exact_runs(model: Path, tmp_path_factory: pytest.TempPathFactory, fresh_seed: int) -> ExactRuns:
    # On a busy machine the starts take longer than pytest lets a test be silent; each has a limit of its own.
    faulthandler.cancel_dump_traceback_later()
    folder = tmp_path_factory.mktemp("exact")
    lines = [json.dumps({"id": f"p{n}", "prompt": text}) for n, text in enumerate(prompts(fresh_seed, 7))]
    lines[2:2] = [
        "{not json",
        '{"id": 1}',
        "",
        '{"id": "p0", "prompt": "again"}',
        json.dumps({"prompt": "x" * 9000}),
    ]
    mixed, good = folder / "prompts.jsonl", folder / "prompts.txt"
    mixed.write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    good.write_text("\n".join(prompts(7, LINES)) + "\n")
    outputs, expected, resumed = {}, b"", folder / "resumed.jsonl"
    for n in (1, 2, 3):
        words = ["generate", str(model), "--prompts", str(mixed), "--out", str(folder / f"{n}.jsonl")]
        commands = [[*words, "--exact", "--max-new-tokens", "8"]]
        if n == 2:
            commands.append(words_of(model, good, folder / "good.jsonl", "--exact", "--batch", "1"))
        if n == 3:
            expected = (folder / "good.jsonl").read_bytes()
            resumed.write_bytes(b"".join(sorted(expected.splitlines(keepends=True))))
            commands += later_commands(model, good, resumed)
        (folder / f"output{n}").mkdir()
        jobs = run_commands(n, commands, folder / f"output{n}")
        for job in jobs[:2] if n == 2 else jobs[:1]:
            assert job.returncode == 0, job.stderr
        outputs[n] = jobs[0].stdout
    return ExactRuns(folder, outputs, good, expected, resumed, jobs[1:])


def later_commands(model: Path, file: Path, out: Path) -> list[list[str]]:
    alike = ["--exact", "--batch", "1", "--resume"]
    commands = [words_of(model, file, out, *alike, *more) for more in ((), ("--seed", "5"))]
    return [*commands, words_of(model, file, out.with_name("other.jsonl"), "--kernel", "abacus")]


def test_exact_text_is_the_same_on_any_number_of_ranks(exact_runs: ExactRuns) -> None:
    folder, texts, errors = exact_runs.folder, [], []
    for n, output in exact_runs.outputs.items():
        counts = f"7 of 7 prompts answered; 5 lines refused, see {folder}/{n}.errors.jsonl"
        assert f"{folder / f'{n}.jsonl'}: {counts}" in output
        texts.append((folder / f"{n}.jsonl").read_bytes())
        errors.append(records(folder / f"{n}.errors.jsonl"))
    assert texts[0] == texts[1] == texts[2]
    assert [r["id"] for r in records(folder / "1.jsonl")] == [f"p{n}" for n in range(7)]
    assert errors[0] == errors[1] == errors[2]
    told = {entry["line"]: entry["error"] for entry in errors[0]}
    for line, words in {
        3: "not JSON",
        4: 'a text "prompt"',
        6: "that of line 1",
        7: "9000 tokens, and the model has positions for",
        13: "not UTF-8",
    }.items():
        assert words in told.pop(line)
    assert not told


def words_of(model: Path, file: Path, out: Path, *more: str) -> list[str]:
    words = ["generate", str(model), "--prompts", str(file), "--out", str(out)]
    return [*words, "--max-new-tokens", "30", "--batch", "2", *more]


def start(
    model: Path, file: Path, out: Path, n: int, mark: str, *more: str
) -> "Future[subprocess.CompletedProcess[str]]":
    words = [*XPAR[:-1], *words_of(model, file, out, *more)]
    return ThreadPoolExecutor(1).submit(mpirun, n, words, env={MARK: mark})


def ranks(mark: str) -> list[int]:
    """Process ids of a job's ranks."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                command = (entry / "cmdline").read_bytes().split(b"\0")
                found += [int(entry.name)] * (command[1:3] == [b"-m", b"xpar.engine"])
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
    return found


def signal_one(mark: str, out: Path, number: int, answers: int, draw: random.Random) -> None:
    """Send ``number`` to a rank once ``answers`` answers are written; 0: once the first can be."""
    limit, pids = time.monotonic() + 100, ranks(mark)
    while not out.exists() or out.read_bytes().count(b"\n") < answers:
        assert time.monotonic() < limit, f"{out}: {answers} answers never came"
        time.sleep(0.01)
        pids = pids if len(pids) == 2 else ranks(mark)
    time.sleep(draw.uniform(0, 0.05))  # the step that it hits is another one each time
    os.kill(draw.choice(pids), number)


@pytest.mark.parametrize(("number", "n"), [(signal.SIGKILL, 3), (signal.SIGTERM, 1)], ids=["kill", "term"])
def test_nothing_is_lost(
    model: Path,
    tmp_path: Path,
    exact_runs: ExactRuns,
    fresh_seed: int,
    number: signal.Signals,
    n: int,
) -> None:
    """Two ranks are ended, and ``n`` go on."""
    file, expected = exact_runs.file, exact_runs.expected
    out, draw, mark = tmp_path / "out.jsonl", random.Random(fresh_seed), uuid.uuid4().hex
    running = start(model, file, out, 2, mark, "--exact", "--batch", "1")
    signal_one(mark, out, number, draw.randrange(LINES // 3), draw)
    job = running.result()
    text = out.read_bytes()
    before = [json.loads(line) for line in text.split(b"\n")[:-1]]
    if number == signal.SIGTERM:
        assert job.returncode == 0, job.stderr
        assert f"{len(before)} of {LINES} prompts answered; stopped by SIGTERM, " in job.stdout
        assert text.endswith(b"\n") or not text
    else:
        assert job.returncode != 0
    assert len(before) < LINES
    with open(out, "ab") as file_of_answers:  # what a rank killed in the middle of a write leaves
        file_of_answers.write(b'{"line": 20, "te')
    job = start(model, file, out, n, uuid.uuid4().hex, "--exact", "--batch", "1", "--resume").result()
    assert job.returncode == 0, job.stderr
    assert out.read_bytes() == expected
    if before:
        assert f"{LINES} of {LINES} prompts answered, {len(before)} of them before" in job.stdout


def test_resume_with_nothing_left_or_other_options(exact_runs: ExactRuns) -> None:
    again, changed, _ = exact_runs.later
    assert again.returncode == 0 and "tokens/s" not in again.stdout
    assert changed.returncode == 1 and changed.stderr.count("line 1 was answered with another model") == 1
    assert exact_runs.resumed.read_bytes() == exact_runs.expected


def test_a_mistake_found_late_is_one_line(exact_runs: ExactRuns) -> None:
    job = exact_runs.later[2]
    assert job.returncode == 1
    assert job.stderr.count("kernel='abacus'") == 1 and "Traceback" not in job.stderr, job.stderr


WRONG = {
    "batch": (["--batch", "0"], "--batch 0: must be at least 1"),
    "threads": (["--threads", "-1"], "--threads -1: must be at least 1"),
    "tokens": (["--max-new-tokens", "0"], "--max-new-tokens 0: must be at least 1"),
    "stop": (["--stop", ""], "an empty text would end every answer"),
    "exact": (["--exact", "--batch", "2"], "--exact --batch 2: sequences of one batch"),
    "temperature": (["--temperature", "-1"], "temperature=-1.0: must be 0"),
    "nan": (["--temperature", "nan"], "temperature=nan: must be 0"),
    "top-p": (["--temperature", "1", "--top-p", "1.5"], "top-p=1.5: must be above 0"),
    "top-k": (["--temperature", "1", "--top-k", "-5"], "top-k=-5: must be at least 1"),
    "greedy": (["--top-k", "5"], "temperature 0 draws nothing; set temperature"),
    "folder": (["--out", "/nowhere/out.jsonl"], "its folder does not exist"),
    "prompts": (["--prompts", "/nowhere/p.txt"], "/nowhere/p.txt: no such file"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_words(model: Path, tmp_path: Path, what: str) -> None:
    words, message = WRONG[what]
    (tmp_path / "p.txt").write_text("a\n")
    args = parser().parse_args(["generate", str(model), "--prompts", str(tmp_path / "p.txt"), *words])
    with pytest.raises(ValueError, match=re.escape(message)):
        make_request(args, is_first=True)


def test_answers_that_are_there_are_kept(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n")
    (tmp_path / "p.answers.jsonl").write_text("mine\n")
    args = parser().parse_args(["generate", str(model), "--prompts", str(tmp_path / "p.txt")])
    with pytest.raises(ValueError, match=r"p\.answers\.jsonl: exists; give --resume"):
        make_request(args, is_first=True)
    make_request(args, is_first=False)  # another node may not see the file
    with pytest.raises(ValueError, match="line 1 is no answer of xpar generate"):
        read_answers(tmp_path / "p.answers.jsonl", set(), "")


def test_what_a_folder_lacks_is_named(model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        Tokenizer(tmp_path)
    shutil.copytree(model, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="has no chat template; leave --chat out"):
        Tokenizer(tmp_path / "plain", chat=True)


SPOILED = """
import os, resource, sys
from xpar.engine import cli
from xpar.engine.checkpoint import tensor_file
from xpar.engine.generation import answer_file as results
first = os.environ.get("PMI_RANK", os.environ.get("OMPI_COMM_WORLD_RANK")) == "0"

def shortened(self, *args, **kwargs):
    self.entries  # what was checked when the file was opened
    os.truncate(self.path, 1000)
    return read_into(self, *args, **kwargs)

def full(self, records):
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, resource.RLIM_INFINITY))
    append(self, records)

read_into, append = tensor_file.TensorFile.read_into, results.AnswerFile.append
{spoil}
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_checkpoint_that_vanishes_while_it_is_read(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "p.txt").write_text("a\n")
    source = SPOILED.format(spoil="if not first: tensor_file.TensorFile.read_into = shortened")
    words = ["generate", str(tmp_path / "model"), "--prompts", str(tmp_path / "p.txt")]
    job = mpirun(2, [sys.executable, "-c", source, *words])
    assert job.returncode == 1 and "Traceback" not in job.stderr, job.stderr
    assert job.stderr.count("xpar: error: ") == 1 and "it was shortened while in use" in job.stderr


def test_a_full_disk_is_one_error_and_keeps_what_was_written(model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(prompts(7, 6)) + "\n")
    out = tmp_path / "out.jsonl"
    source = SPOILED.format(spoil="if first: results.AnswerFile.append = full")
    words = ["generate", str(model), "--prompts", str(tmp_path / "p.txt"), "--out", str(out)]
    job = mpirun(2, [sys.executable, "-c", source, *words, "--max-new-tokens", "4"])
    assert job.returncode == 1 and "Traceback" not in job.stderr, job.stderr
    text = f"xpar: error: writing answers: rank 0: {out}: cannot be written (File too large)"
    assert job.stderr.count(text) == 1, job.stderr
    written = out.read_bytes()
    assert len(written) == 700 and "hash" in json.loads(written.partition(b"\n")[0])
