"""A process that owns the second death lock of a file until its input ends."""

import mmap
import os
import sys

from xpar.comm.watchdog.death_lock import LOCK_BYTES, DeathLock

with open(sys.argv[1], "r+b") as file:
    memory = mmap.mmap(file.fileno(), 2 * LOCK_BYTES)
sys.stdout.write(f"{DeathLock(memory, LOCK_BYTES).acquire()}\n")
sys.stdout.flush()
sys.stdin.readline()
os._exit(3)
