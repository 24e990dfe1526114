"""The programs that check GPUs start without one and call what there is: no change breaks them unseen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "gpu"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py") if "__main__" in path.read_text())
START_ALL = """
import json, runpy, sys, traceback
path, problems = list(sys.path), []
for script in sys.argv[1:]:
    sys.path[:] = path  # no script finds what another one adds
    try:
        runpy.run_path(script)
        problems.append("")
    except BaseException:
        problems.append(traceback.format_exc())
print(json.dumps(problems))
"""


@pytest.fixture(scope="module")
def problems() -> dict[str, str]:
    """What is wrong with the start of each script; one process starts them all, as torch takes seconds."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", START_ALL, *(str(FOLDER / script) for script in SCRIPTS)],
        check=False,
        cwd=FOLDER,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(SCRIPTS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_import_of_a_gpu_script_is_found(script: str, problems: dict[str, str]) -> None:
    assert not problems[script], problems[script]


def test_gpu_scripts_and_benchmarks_call_functions_with_their_arguments() -> None:
    """mypy reads what no test runs; only wrong calls and unknown names count."""
    searched = (".typing", "tests/support", "tests/kernels/gpu", "tests/gpu")
    files = [*FOLDER.glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--explicit-package-bases", *map(str, files)],
        check=False,
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": os.pathsep.join(str(ROOT / folder) for folder in searched)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines()[-1].startswith(("Found ", "Success")), done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("tests/gpu/", "benchmarks/"))]
    assert not [line for line in lines if line.endswith(("[call-arg]", "[name-defined]"))]
