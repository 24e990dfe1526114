"""``xpar generate`` onto a full file system: one error, and with room one rank answers the rest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import ALONE, can_mount, clean_environment, find_mpirun
from moe_families import Case
from tiny_models import prompts, write_model

LINES = 10
NAME = "n" * 500
"""Bytes of a prompt, and so of its answer: ten fill the disk."""
TWICE = """
mount -t tmpfs -o size=4k tmpfs answers || exit 9
mpirun=$1
shift
"$mpirun" -n 2 "$@"; echo "ended with $?"
tail -n 1 answers/out.jsonl | wc -l
wc -c <answers/out.jsonl
mount -o remount,size=1m answers
"$@" --resume; echo "ended with $?"
cat answers/out.jsonl
"""


@pytest.mark.skipif(not can_mount(), reason="no mounts of one's own")
def test_a_full_disk_is_one_error_and_with_room_the_rest_is_answered(tmp_path: Path, fresh_seed: int) -> None:
    write_model(Case("olmoe", "olmoe"), tmp_path / "model", torch.bfloat16, 3, hidden=64)
    asked = [{"id": f"{NAME}{n}", "prompt": text} for n, text in enumerate(prompts(fresh_seed, LINES))]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    (tmp_path / "answers").mkdir()
    command = [find_mpirun(), sys.executable, "-m", "xpar.engine", "generate", "model"]
    options = ["--prompts", "p.jsonl", "--out", "answers/out.jsonl", "--max-new-tokens", "2"]
    done = subprocess.run(
        [*ALONE, "sh", "-c", TWICE, "-", *command, *options],
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    first, _, second = done.stdout.partition("ended with 1\n")
    assert "prompts answered" not in first, done.stdout
    text = "answers/out.jsonl: cannot be written (No space left on device"
    assert done.stderr.count(text) == 1 and "Traceback" not in done.stderr, done.stderr
    size = int(second.split()[1])
    assert 0 < size <= 4096
    assert "ended with 0\n" in second, done.stdout + done.stderr
    answers = [json.loads(line) for line in second.splitlines() if line.startswith("{")]
    assert [result["line"] for result in answers if "line" in result] == list(range(1, LINES + 1))
    assert os.listdir(tmp_path / "answers") == []  # nobody else saw that disk
