"""Runs the tests of the GPU kernels in Triton's interpreter, each file in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import clean_environment

FOLDER = Path(__file__).parent / "gpu"


@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
def test_in_the_interpreter(file):
    words = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "-W", "ignore"]
    done = subprocess.run(
        [*words, FOLDER / file],
        check=False,
        cwd=FOLDER.parents[2],
        env=clean_environment() | {"TRITON_INTERPRET": "1", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]
