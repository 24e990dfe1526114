"""``xpar generate`` onto a file system that is really full: one error, and with room made the rest is answered."""

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

LINES = 40
TWICE = """
mount -t tmpfs -o size=4k tmpfs "$1" || exit 9
shift
"$@"; echo "ended with $?"
tail -n 1 answers/out.jsonl | wc -l
wc -c <answers/out.jsonl
mount -o remount,size=1m answers
"$@" --resume; echo "ended with $?"
cat answers/out.jsonl
"""


@pytest.mark.skipif(not can_mount(), reason="no mounts of one's own")
def test_a_full_disk_is_one_error_and_with_room_the_rest_is_answered(tmp_path: Path, fresh_seed: int) -> None:
    write_model(Case("olmoe", "olmoe"), tmp_path / "model", torch.bfloat16, 3, hidden=64)
    (tmp_path / "p.txt").write_text("\n".join(prompts(fresh_seed, LINES)) + "\n")
    (tmp_path / "answers").mkdir()
    command = [find_mpirun(), "-n", "2", sys.executable, "-m", "xpar.engine", "generate", "model"]
    options = ["--prompts", "p.txt", "--out", "answers/out.jsonl", "--max-new-tokens", "2"]
    done = subprocess.run(
        [*ALONE, "sh", "-c", TWICE, "-", "answers", *command, *options],
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
    assert [record["line"] for record in answers if "line" in record] == list(range(1, LINES + 1))
    assert os.listdir(tmp_path / "answers") == []  # nobody else saw that disk
