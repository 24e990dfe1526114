"""Run ``xpar`` commands one after the other: ``commands.py FOLDER '[["run", "made"], ["doctor"]]'``, on every rank.

Each rank's descriptors 1 and 2 lead to files of its own in FOLDER, so that no output is taken for another command's.
"""

import json
import os
import sys

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
    sys.stdout.flush()
    sys.stderr.flush()
    with open(f"{folder}/{i}.{MPI.COMM_WORLD.rank}.status", "w") as file:
        file.write(str(status))
    MPI.COMM_WORLD.Barrier()
