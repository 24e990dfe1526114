"""The Python programs of README and docs/ run as they stand, on two ranks."""

import re
import sys
from pathlib import Path

import pytest
from launch import mpirun

from xpar.engine.cli import main

ROOT = Path(__file__).parents[1]
PROGRAMS = {
    f"{page.name}-{number}": program
    for page in sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    for number, program in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the pages' ``path/to/checkpoint`` is a small checkpoint."""
    folder = tmp_path_factory.mktemp("pages")
    size = ["--hidden", "64", "--intermediate", "32"]
    assert main(["make-checkpoint", "olmoe", str(folder / "path/to/checkpoint"), *size]) == 0
    return folder


def test_pages_have_programs() -> None:
    assert {"run.md-0", "generate.md-0"} <= set(PROGRAMS)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_a_page_runs_on_two_ranks(folder: Path, name: str) -> None:
    program = folder / f"{name}.py"
    # A program without xpar.comm.run's exit status would hide an error that all ranks share.
    assert PROGRAMS[name].count("\nrun(main)") == 1
    program.write_text(PROGRAMS[name].replace("\nrun(main)", "\nraise SystemExit(run(main))"))
    done = mpirun(2, [sys.executable, "-m", "mpi4py", str(program)], cwd=folder, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    if "print" in PROGRAMS[name]:
        assert {"0 torch.Size([100, 64])", "1 torch.Size([101, 64])"} == set(done.stdout.splitlines())
