"""``benchmarks/several_gpus.py`` keeps what it has, gives steps GPUs of their own, and measures alone."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# Notes what it was started with, and when; a name in FAIL or HANG ends wrongly or not at all.
MPIRUN = """#!{python}
import json, os, sys, time
begin = time.time()
words = " ".join(sys.argv[1:])
if os.environ["HANG"] in words:
    time.sleep(60)
time.sleep(0.02)
note = dict(words=words, gpus=os.environ["CUDA_VISIBLE_DEVICES"], begin=begin, end=time.time())
with open({notes!r}, "a") as file:
    file.write(json.dumps(note) + "\\n")
code = 9 if " kill" in words else 17 if " hang" in words else 0
sys.exit(3 if os.environ["FAIL"] in words else code)
"""


def run(folder: Path, seconds: float, fail: str = "-none-", hang: str = "-none-") -> tuple[int, Any, Any]:
    """Exit code, summary, and what the stand-in for mpirun was started with."""
    programs, notes = folder / "bin", folder / "notes"
    programs.mkdir()
    (programs / "mpirun").write_text(MPIRUN.format(python=sys.executable, notes=str(notes)))
    (programs / "xpar").write_text("#!/bin/sh\nexit 0\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    words = ["--out", str(folder / "out"), "--gpus", "4", "--seconds", str(seconds)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "several_gpus.py"), *words],
        check=False,
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "FAIL": fail, "HANG": hang},
        cwd=folder,
        timeout=120,
    )
    summary = json.loads((folder / "out" / "summary.json").read_text())
    return done.returncode, summary, [json.loads(line) for line in notes.read_text().splitlines()]


def test_steps_have_gpus_of_their_own_and_measurements_the_host(tmp_path: Path) -> None:
    code, summary, started = run(tmp_path, 100.0)
    assert code == 0, summary
    assert {s["gpus"] for s in summary} == {0, 1, 2, 4}
    assert len(started) == len([s for s in summary if s["gpus"]])
    for number, a in enumerate(started):
        ranks = int(a["words"].split()[1])
        assert len(a["gpus"].split(",")) == ranks
        for b in started[number + 1 :]:
            if a["begin"] < b["end"] and b["begin"] < a["end"]:
                assert not set(a["gpus"].split(",")) & set(b["gpus"].split(","))
                assert "bench" not in a["words"].split() and "bench" not in b["words"].split()


def test_a_failure_and_a_limit_leave_the_rest(tmp_path: Path) -> None:
    begin = time.monotonic()
    code, summary, _ = run(tmp_path, 14.0, fail="check_layer.py", hang="bench generate")
    assert code == 1
    assert time.monotonic() - begin < 60
    ended = {s["step"]: s["ended"] for s in summary}
    assert ended["layer-1"] == ended["layer-4"] == "exit code 3"
    assert ended["one-sided-2"] == ended["kill-4"] == ended["make-olmoe4"] == "right"
    assert ended["generate-1"] == "cut off"
    assert ended["scaling-deepseek-v3"] == "no time was left"


def test_the_program_says_what_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "several_gpus.py"), "--out", str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(tmp_path)},
        timeout=60,
    )
    assert done.returncode == 2
    assert "mpirun and xpar must be on the PATH" in done.stderr


@pytest.mark.parametrize(
    "script", ["check_one_sided.py", "check_comm.py", "check_layer.py", "check_generate.py"]
)
def test_what_it_starts_exists(script: str) -> None:
    assert (ROOT / "tests" / "gpu" / script).is_file()
