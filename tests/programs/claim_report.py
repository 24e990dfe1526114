"""A process that claims the report of a status board and lives until its input ends.

The board's file is given as argument.
"""

import mmap
import os
import sys

from xpar.comm.watchdog.status_board import ROW_BYTES, StatusBoard

file = os.open(sys.argv[1], os.O_RDWR)
sys.stdout.write(f"{StatusBoard(mmap.mmap(file, ROW_BYTES), 0, 1, file, True).claim_report()}\n")
sys.stdout.flush()
sys.stdin.read()
