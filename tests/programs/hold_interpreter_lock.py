"""A process that never releases the interpreter's lock.

It prints the descriptor of its file of stacks first.
"""

import ctypes
import sys

from xpar.comm.watchdog import stack_dump


def holds_the_lock() -> None:
    libc = ctypes.PyDLL(None)
    while True:
        libc.sleep(100)


sys.stdout.write(f"{stack_dump.register_stack_dump()}\n")
sys.stdout.flush()
holds_the_lock()
