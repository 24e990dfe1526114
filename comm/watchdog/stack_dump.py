"""The stacks of other processes of this node, and what the kernel says of them.

A signal handler writes the stacks. It is faulthandler's and runs in C, so that a process that is blocked in
MPI or that never releases the interpreter's lock writes its stacks all the same. They go to a file in memory
that belongs to the process, and that other processes of the user can read.
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
"""A signal that no other library is likely to use. SIGUSR1 is for people and shows the stacks on stderr."""
WAIT_S = 1.0
"""seconds that processes have to write their stacks"""
FLAGS, EXIT_CODE = 6, 49
"""Indices among the fields of /proc/PID/stat from the state on; proc(5) counts from 1 and two fields more."""
EXITING = 0x4
"""PF_EXITING in the kernel's include/linux/sched.h: the process executes nothing any more."""
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
HIDDEN_FILES = (str(Path(__file__).parent), "comm/device/watch.py", "<no Python frame>")
"""A thread with one of these in its stack only watches, or has not begun, and is left out of reports."""


def register_stack_dump() -> int:
    """Let processes of this user ask for stacks; return their file's descriptor, or -1."""
    if signal.getsignal(SIGNAL) is not signal.SIG_DFL:
        return -1
    try:
        file = os.memfd_create("xpar-stacks", os.MFD_CLOEXEC)
    except (OSError, AttributeError):  # an older kernel, or a Python made for one
        return -1
    faulthandler.register(SIGNAL, file=file, all_threads=True)
    return file


def collect_stacks(files: Iterable[tuple[int, int]]) -> list[str]:
    """Return the stacks of each (process, descriptor), empty if not written within a second."""
    files = list(files)
    written = [len(_read(*file)) for file in files]  # by earlier requests
    asked = [_ask(pid, file) if file >= 0 else False for pid, file in files]
    texts = [""] * len(files)
    if not any(asked):
        return texts
    limit = time.monotonic() + WAIT_S
    while time.monotonic() < limit:
        time.sleep(0.05)
        previous = texts
        texts = [_read(*p)[old:] if ok else "" for p, old, ok in zip(files, written, asked, strict=True)]
        if previous == texts and all(text or not ok for text, ok in zip(texts, asked, strict=True)):
            break
    return [clean_stacks(text) for text in texts]


def process_state(pid: int) -> str:
    """Return what the kernel says of a process: ``stopped``, ``gone``, or nothing."""
    fields = _stat(pid)
    if not fields or int(fields[FLAGS]) & EXITING:
        return "gone"
    return {"T": "stopped", "t": "stopped", "Z": "gone", "X": "gone"}.get(fields[0], "")


@dataclass(frozen=True)
class ExitCause:
    """The cause of a process's end in words, and whether it was a signal."""

    text: str
    by_signal: bool


def exit_cause(pid: int) -> ExitCause:
    """Read from /proc why a process ends. Works for a zombie and for a process that is exiting."""
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
    """Return the fields of /proc/PID/stat from the state on; none of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def clean_stacks(text: str) -> str:
    """Remove the watchdog's threads and varying numbers from faulthandler's text."""
    blocks = [b for b in text.strip().split("\n\n") if not any(part in b for part in HIDDEN_FILES)]
    text = "\n".join(blocks)
    return re.sub(r"(Current thread|Thread) 0x[0-9a-f]+( \[[^]]*\])?", r"\1", text)


def _ask(pid: int, file: int) -> bool:
    """Have process ``pid`` write its stacks to its ``file``; False if it cannot."""
    if pid == os.getpid():
        # This thread has the interpreter's lock, so that no stack changes meanwhile. The signal handler,
        # which may read a thread's stack at any moment, sometimes crashes.
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
