"""A program that has a handler of its own for SIGUSR1."""

import signal
import sys

from xpar.comm import run

signal.signal(signal.SIGUSR1, lambda *_: sys.stdout.write("mine\n"))
run(lambda: signal.raise_signal(signal.SIGUSR1))
