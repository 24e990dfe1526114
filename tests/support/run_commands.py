"""Several ``xpar`` commands in one MPI job, for tests of what commands say: a start costs every rank seconds."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import mpirun

# Each rank's descriptors 1 and 2 lead to files of its own, so that nothing is taken for another command's.
PROGRAM = """
import json, os, sys
from mpi4py import MPI
from xpar.engine.cli import main
folder, commands = sys.argv[1], json.loads(sys.argv[2])
for i, words in enumerate(commands):
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        stream.flush()
        with open(f"{folder}/{i}.{MPI.COMM_WORLD.rank}.{name}", "wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    with open(f"{folder}/{i}.{MPI.COMM_WORLD.rank}.status", "w") as file:
        file.write(str(status))
    MPI.COMM_WORLD.Barrier()
"""


def in_turn(
    n: int,
    commands: Sequence[Sequence[str]],
    folder: Path,
    *,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """What ``xpar`` says to each of ``commands`` on ``n`` ranks, which run them one after the other in one process each.

    ``folder``: an empty one. Exit status: the largest of the ranks'. Output: rank 0's, then rank 1's, and so on.
    Raises AssertionError, with all that was said, if a command ends the job or leaves a rank waiting.
    """
    words = [sys.executable, "-m", "mpi4py", "-c", PROGRAM, str(folder), json.dumps([*map(list, commands)])]
    try:
        job = str(mpirun(n, words, timeout=timeout, env=env))
    except TimeoutError as late:
        job = str(late)

    def read(command: int, name: str) -> list[str]:
        files = [folder / f"{command}.{rank}.{name}" for rank in range(n)]
        return [file.read_text() for file in files if file.exists()]

    done = []
    for i, words in enumerate(commands):
        status, out, err = (read(i, name) for name in ("status", "out", "err"))
        assert len(status) == n, f"{words} did not come back\n{''.join(out)}\n{''.join(err)}\n{job}"
        done.append(subprocess.CompletedProcess(words, max(map(int, status)), "".join(out), "".join(err)))
    return done
