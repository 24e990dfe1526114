"""The templates under scripts/: they parse, they agree with each other and with setup.cfg, and the one for
PBS runs."""

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch import clean_environment

ROOT = Path(__file__).parent.parent
SLURM = sorted((ROOT / "scripts" / "slurm").glob("*.sbatch"))
SHELL = [
    *SLURM,
    *(ROOT / "scripts").rglob("*.sh"),
    *(ROOT / "scripts").rglob("*.pbs"),
    *(ROOT / "scripts").rglob("*.flux"),
]
SECTIONS = (
    "EDIT: one of these two blocks",
    "EDIT: where xpar is",
    "EDIT: which MPI",
    "Threads and NUMA",
    "NCCL:",
)
RANK = """#!/bin/bash
echo "rank $PMI_RANK of $PMI_SIZE, local $MPI_LOCALRANKID of $MPI_LOCALNRANKS, threads $OMP_NUM_THREADS: $*"
if [ "$1" = "$FAILING" ]; then exit 5; fi
"""


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_script_parses_and_says_how_it_is_used(script: Path) -> None:
    done = subprocess.run(
        ["bash", "-n", str(script)], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert script.read_text().split("\n")[1].startswith("# ") or script.name == "environment.sh"


@pytest.mark.parametrize("title", SECTIONS)
def test_batch_scripts_have_the_same_section(title: str) -> None:
    """Each script is whole, so these lines stand in all three: a change to one belongs in the others."""
    found = {section(path.read_text(), title) for path in SLURM}
    assert len(SLURM) == 3 and len(found) == 1


def section(text: str, title: str) -> str:
    """From the heading with ``title`` to the next, or to the first blank line where none follows."""
    match = re.search(rf"^# ---- {re.escape(title)}.*?(?=^# ---- |\n\n)", text, re.MULTILINE | re.DOTALL)
    assert match, title
    return match.group(0)


@pytest.mark.parametrize("failing", ["", "doctor"])
def test_pbs_script_starts_the_ranks_that_pbs_lists(tmp_path: Path, failing: str) -> None:
    command = tmp_path / "xpar"
    command.write_text(RANK)
    command.chmod(0o755)
    (tmp_path / "nodes").write_text("a\na\nb\n")
    job = {
        "PBS_NODEFILE": str(tmp_path / "nodes"),
        "PBS_O_WORKDIR": str(tmp_path),
        "NCPUS": "2",
        "FAILING": failing,
    }
    options = {"CHECKPOINT": "made", "OPTIONS": "--tokens 8 --verify"}
    path = f"{tmp_path}:{Path(sys.executable).parent}:{clean_environment()['PATH']}"
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "pbs" / "run.pbs")],
        env=clean_environment() | {"OMP_NUM_THREADS": ""} | job | options | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    places = ("rank 0 of 3, local 0 of 2", "rank 1 of 3, local 1 of 2", "rank 2 of 3, local 0 of 1")
    said = ["doctor"] if failing else ["doctor", "run made --tokens 8 --verify"]
    expected = {f"{place}, threads 2: {words}" for place in places for words in said}
    assert set(done.stdout.splitlines()) == expected, done.stdout + done.stderr
    assert (done.returncode != 0) == ("job stopped" in done.stderr) == bool(failing)


def test_spack_recipe_names_the_requirements_of_setup_cfg() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    recipe = (ROOT / "scripts" / "spack" / "packages" / "py-xpar" / "package.py").read_text()
    calls = [node for node in ast.walk(ast.parse(recipe)) if isinstance(node, ast.Call)]
    named = {
        ast.literal_eval(c.args[0]) for c in calls if getattr(c.func, "id", "") in ("depends_on", "version")
    }
    for requirement in config["options"]["install_requires"].strip().splitlines():
        name, least = requirement.partition(";")[0].strip().split(">=")
        assert {f"py-{name}@{least}:", f"py-{name}@{least.removesuffix('.0')}:"} & named, requirement
    assert config["metadata"]["version"] in named
    assert f"python@{config['options']['python_requires'].removeprefix('>=')}:" in named
