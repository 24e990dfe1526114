"""A job that makes a process grid on the device given as argument."""

import sys

from xpar.comm import ProcessGrid, World, run


def main() -> None:
    ProcessGrid.create(World.attach(), device=sys.argv[1])


sys.exit(run(main))
