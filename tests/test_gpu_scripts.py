"""The programs that check GPUs start without one, so that a move of a module does not break them unseen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in (ROOT / "tests" / "gpu").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_import_of_a_gpu_script_is_found(script: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", f"import runpy; runpy.run_path({str(ROOT / 'tests' / 'gpu' / script)!r})"],
        check=False,
        cwd=ROOT / "tests" / "gpu",
        env=environment | {"PYTHONPATH": str(ROOT / "tests" / "gpu")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
