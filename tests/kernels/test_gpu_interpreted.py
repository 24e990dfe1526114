"""The tests of ``tests/kernels/gpu``, run in Triton's interpreter in processes of their own."""

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import clean_environment

FOLDER = Path(__file__).parent / "gpu"
FORMS = "activations or dtypes or tables"
# One test must not take minutes on a busy machine, so a long file is split into two complementary parts.
PARTS = {"test_experts.py": (FORMS, f"not ({FORMS})")}


@pytest.mark.parametrize(
    ("file", "part"),
    [(path.name, part) for path in sorted(FOLDER.glob("test_*.py")) for part in PARTS.get(path.name, ("",))],
)
def test_in_the_interpreter(file, part):
    words = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "-W", "ignore"]
    # On a busy machine this takes longer than pytest lets a test be silent; it has a limit of its own.
    faulthandler.cancel_dump_traceback_later()
    done = subprocess.run(
        [*words, "-k", part, FOLDER / file],
        check=False,
        cwd=FOLDER.parents[2],
        env=clean_environment() | {"TRITON_INTERPRET": "1", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]
