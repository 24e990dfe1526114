"""Run ``xpar`` commands one after the other: ``commands.py FOLDER '[["run", "made"], ["doctor"]]'``, on every
rank.

Each rank's descriptors 1 and 2 lead to files of its own in FOLDER, so that no output is taken for another
command's.
"""

import json
import os
import sys


def main(folder: str, commands: list[list[str]]) -> None:
    """Run ``commands``, with output and exit status of each in ``folder``."""
    # Not at the top: a process that a command starts imports this file, and must not initialise MPI.
    from mpi4py import MPI

    from xpar.engine.cli import main as xpar

    rank = MPI.COMM_WORLD.rank
    for i, words in enumerate(commands):
        for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
            stream.flush()
            with open(f"{folder}/{i}.{rank}.{name}", "wb") as file:
                os.dup2(file.fileno(), stream.fileno())
        try:
            status = xpar(words)
        except SystemExit as end:
            status = end.code
        with open(f"{folder}/{i}.{rank}.status", "w") as file:
            file.write(str(status))
        MPI.COMM_WORLD.Barrier()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
