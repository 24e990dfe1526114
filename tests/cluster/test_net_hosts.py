"""Ranks on hosts with nothing between them but a network of a given speed, as ``scripts/net_hosts.sh`` makes
them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch import clean_environment

SCRIPT = Path(__file__).parents[2] / "scripts" / "net_hosts.sh"
WORDS = ["-m", "mpi4py", "-m", "xpar.engine", "bench", "comm", "--megabytes", "0.1", "--threads", "1"]


def lacking() -> str | None:
    """Why this machine cannot make such hosts, if it cannot."""
    missing = [tool for tool in ("ip", "tc", "unshare") if shutil.which(tool) is None]
    if missing or os.geteuid():
        return f"needs root and iproute2; missing: {', '.join(missing) or 'root'}"
    tried = subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True, text=True)
    return tried.stderr.strip() or None


@pytest.mark.skipif(lacking() is not None, reason=f"network namespaces: {lacking()}")
def test_dispatchers_between_hosts(tmp_path: Path) -> None:
    found = tmp_path / "comm.json"
    words = [SCRIPT, "2", "2", "1gbit", sys.executable, *WORDS, "--json", str(found)]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = subprocess.run(
        words,
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env=clean_environment() | {"PATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert job.returncode == 0, job.stdout + job.stderr
    document = json.loads(found.read_text())
    assert [entry["node"] for entry in document["manifest"]["node_map"]] == [0, 0, 1, 1]
    assert len({entry["host"] for entry in document["manifest"]["node_map"]}) == 2
    crossing = {r["dispatcher"]: r["rows_across_nodes"] for r in document["results"]}
    assert 0 < crossing["hierarchical"] < crossing["alltoall"] < crossing["allgather"]
    left = subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
    assert "xpar" not in left
