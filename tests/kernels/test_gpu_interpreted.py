"""The tests of ``tests/kernels/gpu``, run in Triton's interpreter in processes of their own."""

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch import clean_environment

FOLDER = Path(__file__).parent / "gpu"
# Two processes, which two workers run at once; for each, the import of torch and Triton takes seconds.
PARTS = {
    "rows and plain experts": ("coded_rows", "experts", "quantise_rows", "small_steps", "sort_rows_route"),
    "experts of codes": ("nibble_experts", "quantised_experts"),
}


def test_every_file_is_in_a_part():
    files = [FOLDER / f"test_{name}.py" for names in PARTS.values() for name in names]
    assert sorted(files) == sorted(FOLDER.glob("test_*.py"))


@pytest.mark.parametrize("part", PARTS)
def test_in_the_interpreter(part):
    words = [sys.executable, "-m", "pytest", "-q", "--color=no", "-p", "no:cacheprovider", "-W", "ignore"]
    # On a busy machine this takes longer than pytest lets a test be silent; it has a limit of its own.
    faulthandler.cancel_dump_traceback_later()
    done = subprocess.run(
        [*words, *(FOLDER / f"test_{name}.py" for name in PARTS[part])],
        check=False,
        cwd=FOLDER.parents[2],
        env=clean_environment() | {"TRITON_INTERPRET": "1", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]
