"""docs/cluster.md: all its commands, in its order, on the cluster that it starts."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from launch import clean_environment
from slurm import ROOT, SHORT_ADDRESSES, processes_with, stopping, venv_path
from stand_in_commands import ANSWERING, stand_in

PAGE = (ROOT / "docs" / "cluster.md").read_text()
COMMANDS = [line.removeprefix("    ") for line in PAGE.splitlines() if line.startswith("    ")]
SETUP = "./scripts/setup.sh"  # scripts/test.sh has run it, or there would be no test


def with_waits(commands: list[str], bin_directory: Path) -> str:
    """As one script; what reads results or stops the cluster waits for the jobs, as a reader would."""
    lines = ["set -euo pipefail", "idle() { while squeue --noheader | grep -q .; do sleep 0.2; done; }"]
    for command in commands:
        if command.startswith(("cat", "scripts/slurm/local_cluster.sh stop")):
            lines.append("idle")
        lines.append(command)
        if command.endswith("bin/activate"):
            lines.append(f"PATH={bin_directory}:$PATH")
    return "\n".join(lines)


@pytest.mark.usefixtures("slurm_installed")
def test_every_command_of_the_page(tmp_path: Path) -> None:
    assert SETUP in COMMANDS and SETUP in (ROOT / "scripts" / "test.sh").read_text()
    venv = Path(venv_path().split(os.pathsep)[0]).parent
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / ".venv").symlink_to(venv)
    stand_in(tmp_path, ANSWERING)
    script = with_waits([c for c in COMMANDS if c != SETUP], tmp_path / "bin")
    with stopping(tmp_path / "my-cluster"):
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env=clean_environment() | SHORT_ADDRESSES,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
    printed = {path.name: path.read_text() for path in tmp_path.glob("*.out")}
    said = "\n".join([done.stdout, done.stderr, *printed.values()])
    assert done.returncode == 0, said
    assert not (tmp_path / "my-cluster").exists()
    assert processes_with(f"XPAR_LOCAL_CLUSTER={tmp_path}/my-cluster") == []
    (ran,) = (text for name, text in printed.items() if name.startswith("xpar-run"))
    assert "no problems found" in ran and "4 ranks on 2 nodes" in ran and ran.count("relative error") == 2, (
        said
    )
    if os.getuid() == 0:  # the nodes have names of their own
        assert ran.count("│ n1 ") == ran.count("│ n2 ") == 2
    check_scaling(tmp_path / "trial", said)
    prompts = (tmp_path / "prompts.jsonl").read_text()
    assert prompts.count("\n") == 10
    assert "".join((tmp_path / "answers" / f"00{i}.jsonl").read_text() for i in range(2)) == prompts, said


def check_scaling(trial: Path, said: str) -> None:
    """The sweep's files are there, and what they hold was measured on one node and on two."""
    names = {"scaling.jsonl", "report.md", "scaling.png", "comm-2.json"}
    assert {path.name for path in trial.iterdir()} == names, said
    found = [json.loads(line) for line in (trial / "scaling.jsonl").read_text().splitlines()]
    assert [(r["mode"], r["ranks"], r["nodes"], r["tokens"]) for r in found] == [
        ("strong", 1, 1, 64),
        ("weak", 1, 1, 64),
        ("strong", 2, 2, 64),
        ("weak", 2, 2, 128),
    ]
    assert all(r["correct"] for r in found)
    assert all((r["dispatch_bytes"]["to_other_nodes"] > 0) == (r["nodes"] == 2) for r in found)
    assert "parallel efficiency, relative to 1 rank x " in said  # the page shows the report
    for record in json.loads((trial / "comm-2.json").read_text())["results"]:
        assert record["dispatcher"] != "shared-memory" and record["rel_error"] < 1e-2
