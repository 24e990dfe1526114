"""The JSON document of a run: its results, and the manifest to repeat the run."""

import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from xpar.comm.grid import ProcessGrid
from xpar.comm.world import World


def write_result(path: Path, manifest: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write ``{"manifest": manifest, **results}`` to the file ``path`` as indented JSON."""
    path.write_text(json.dumps({"manifest": manifest, **results}, indent=2) + "\n")


def grid_manifest(
    grid: ProcessGrid, dtype: torch.dtype, dispatcher: str, kernel: str | None, seed: int
) -> dict[str, Any]:
    """Describe a run on a process grid: :func:`world_manifest` and the arguments.

    ``dispatcher`` may be ``all``; the ``kernel`` of a rank without experts is None.
    """
    s = grid.shape
    return {
        **world_manifest(grid.world),
        "grid": {"tp": s.tp, "dp": s.dp, "ep": s.ep, "etp": s.etp, "edp": s.edp},
        "device": "cpu" if grid.device.type == "cpu" else torch.cuda.get_device_name(grid.device),
        "dtype": str(dtype).removeprefix("torch."),
        "dispatcher": dispatcher,
        "kernel": kernel or "none",
        "seed": seed,
    }


def world_manifest(world: World) -> dict[str, Any]:
    """Describe any run: versions, this node, the time, the place of each rank, the command."""
    return {
        "versions": {
            "xpar": version("xpar"),
            "torch": torch.__version__,
            "mpi": world.library.splitlines()[0],
            "python": platform.python_version(),
        },
        "machine": {"processor": processor_name(), "cores": os.cpu_count()},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "node_map": [
            {"rank": r, "node": n, "host": h}
            for r, (n, h) in enumerate(zip(world.node_of, world.hosts, strict=True))
        ],
        "threads": torch.get_num_threads(),
        "command": [program_name(sys.argv[0]), *sys.argv[1:]],
    }


def program_name(path: str) -> str:
    """Return ``xpar`` for ``python -m xpar.engine``, otherwise the script's name alone."""
    name = Path(path).name
    return "xpar" if name == "__main__.py" else name


def processor_name() -> str:
    """Read the model name of this node's processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
