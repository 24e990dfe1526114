"""Run several ``xpar`` commands in one MPI job: a start costs every rank seconds."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch import mpirun

PROGRAM = Path(__file__).parent.parent / "programs" / "commands.py"


def run_commands(
    n: int,
    commands: Sequence[Sequence[str]],
    folder: Path,
    *,
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> list[subprocess.CompletedProcess[str]]:
    """Run ``xpar`` with each of ``commands`` on ``n`` ranks, one command after the other in one process per
    rank.

    Args:
        n: number of ranks.
        commands: the words of each command.
        folder: an empty folder for the output.
        timeout: seconds for all commands together.
        env: added to the environment.

    Returns:
        For each command the largest exit status of the ranks, and the output of rank 0, then of rank 1, and
        so on.

    Raises:
        AssertionError: a command ended the job or left a rank waiting; the message has all output.
    """
    words = [sys.executable, "-m", "mpi4py", str(PROGRAM), str(folder), json.dumps([*map(list, commands)])]
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
