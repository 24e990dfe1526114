"""The Python stacks of other processes of this node, written by a signal handler that needs nothing of the process.

faulthandler's handler runs in C: a process that is blocked in MPI or that never gives the interpreter lock back writes
its stacks all the same. They go to a file in memory that belongs to the process, where others of the user can read it.
"""

import faulthandler
import os
import re
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SIGNAL = signal.SIGRTMIN + 8
"""One that nobody else is likely to use; SIGUSR1 is for people, and shows the stacks on stderr."""
WAIT_S = 1.0
FLAGS, EXIT_CODE = 6, 49
"""Of the fields of /proc/PID/stat behind the name; proc(5) counts from 1 and has three more in front."""
EXITING = 0x4
"""PF_EXITING in the kernel's include/linux/sched.h: what is left of the process does nothing any more."""
CRASH = "a crash in compiled code; it has written its stack"
CAUSES = {
    "SIGKILL": "out of memory, or killed by hand or by the launcher",
    "SIGTERM": "told to end, by hand or by the launcher",
    "SIGSEGV": CRASH,
    "SIGABRT": CRASH,
    "SIGFPE": CRASH,
    "SIGILL": "a crash in compiled code: not for this processor",
    "SIGBUS": "/dev/shm is full, or a file was shortened while in use",
}
NOT_SHOWN = ("comm/guard/", "comm/device/watch.py", "<no Python frame>")
"""Threads that only watch, or have not begun."""


def register_stack_dump() -> int:
    """Let other processes of this user ask for the stacks of this one; the descriptor of the file, -1 without."""
    if signal.getsignal(SIGNAL) is not signal.SIG_DFL:
        return -1
    try:
        file = os.memfd_create("xpar-stacks", os.MFD_CLOEXEC)
    except (OSError, AttributeError):  # an older kernel, or a Python made for one
        return -1
    faulthandler.register(SIGNAL, file=file, all_threads=True)
    return file


def collect_stacks(places: Iterable[tuple[int, int]]) -> list[str]:
    """For each (process, descriptor) its stacks, empty where it does not write any within a second."""
    places = list(places)
    written = [len(_read(*place)) for place in places]  # when somebody asked before
    asked = [_ask(pid, file) if file >= 0 else False for pid, file in places]
    texts = [""] * len(places)
    if not any(asked):
        return texts
    limit = time.monotonic() + WAIT_S
    while time.monotonic() < limit:
        time.sleep(0.05)
        before = texts
        texts = [_read(*p)[old:] if ok else "" for p, old, ok in zip(places, written, asked, strict=True)]
        if before == texts and all(text or not ok for text, ok in zip(texts, asked, strict=True)):
            break
    return [shown(text) for text in texts]


def process_state(pid: int) -> str:
    """What the kernel says of a process: ``stopped``, ``gone``, or nothing special."""
    fields = _stat(pid)
    if not fields or int(fields[FLAGS]) & EXITING:
        return "gone"
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(fields[0], "")


@dataclass(frozen=True)
class ExitCause:
    """What ended a process, in words, and whether it was a signal."""

    text: str
    by_signal: bool


def exit_cause(pid: int) -> ExitCause:
    """Of a process that is about to go, or that nobody has waited for."""
    fields = _stat(pid)
    if len(fields) <= EXIT_CODE:
        return ExitCause("killed, out of memory, or crashed", False)
    status = int(fields[EXIT_CODE])
    number = status & 0x7F
    if not number:
        return ExitCause(f"exit code {status >> 8}", False)
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    return ExitCause(f"{name} ({CAUSES[name]})" if name in CAUSES else name, True)


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name, from the state on; none of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def shown(text: str) -> str:
    """faulthandler's text without the threads of the watch and without numbers that differ between processes."""
    blocks = [b for b in text.strip().split("\n\n") if not any(part in b for part in NOT_SHOWN)]
    text = "\n".join(blocks)
    return re.sub(r"(Current thread|Thread) 0x[0-9a-f]+( \[[^]]*\])?", r"\1", text)


def _ask(pid: int, file: int) -> bool:
    if pid == os.getpid():
        # Whoever can say this has the interpreter lock: nobody changes the stacks meanwhile, under which the handler, read at
        # any moment of a running thread, sometimes crashes.
        faulthandler.dump_traceback(file=file, all_threads=True)
        return True
    if process_state(pid):
        return False
    with suppress(OSError):
        os.kill(pid, SIGNAL)
        return True
    return False


def _read(pid: int, file: int) -> str:
    try:
        return Path(f"/proc/{pid}/fd/{file}").read_text(errors="replace")
    except OSError:
        return ""
