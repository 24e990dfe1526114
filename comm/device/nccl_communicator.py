"""One NCCL communicator: started over MPI, used with deadlines, given up without waiting for anybody."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from xpar.comm.communicator import Communicator
from xpar.comm.device.nccl_library import IN_PROGRESS, SUCCESS, Comm, Library, NcclError, version_text
from xpar.comm.device.watch import Watch
from xpar.comm.failure import agreed
from xpar.comm.watchdog.deadlines import Deadlines

T = TypeVar("T")
SPIN_SECONDS = 1e-3
"""How long a state is polled without pause: most operations are launched within microseconds."""


class NcclCommunicator:
    """A communicator that is ready. Not blocking: each call waits until NCCL has launched, never until it is done.

    Waiting for the launch keeps NCCL's kernel in its place on the stream: a group is launched from another thread.
    """

    def __init__(
        self, library: Library, comm: Comm, group: Communicator, deadlines: Deadlines, watch: Watch
    ) -> None:
        self.library, self.comm, self.deadlines, self.watch = library, comm, deadlines, watch
        self.rank, self.size, self.name = group.rank, group.size, group.name
        self.broken: str | None = None

    @classmethod
    def connect(
        cls, library: Library, group: Communicator, deadlines: Deadlines, watch: Watch, blocking: bool = False
    ) -> "NcclCommunicator":
        """Collective over ``group``. Raises the same AgreedError on every rank if any of them cannot."""
        doing = f"NCCL for group {group.name}"
        ids = agreed(group, lambda: named(library.unique_id) if group.rank == 0 else b"", doing)
        unique_id: bytes = group.all_gather_object(ids)[0]

        def join() -> Comm:
            comm = named(lambda: library.init(group.size, group.rank, unique_id, blocking))
            try:
                poll_until_done(library, comm, deadlines.connect, f"joining group {group.name}")
            except NcclError as error:
                give_up(library, comm, deadlines.abort)
                raise OSError(f"{error} (NCCL {version_text(library.version())})") from None
            return comm

        return cls(library, agreed(group, join, doing), group, deadlines, watch)

    def run(
        self, what: str, calls: Callable[[], None], done: Callable[[], Callable[[], bool] | None]
    ) -> None:
        """Issue ``calls`` as one operation. ``done`` is asked afterwards for the marker that :class:`Watch` follows.

        Raises :class:`NcclError`; the link is broken then, and its operations are given up.
        """
        if self.broken:
            raise NcclError(f"{what}: group {self.name} is broken since: {self.broken}")
        try:
            self.library.group_start()
            try:
                calls()
            finally:
                self.library.group_end()
            poll_until_done(self.library, self.comm, self.deadlines.launch, what)
        except Exception as error:
            self.break_off(f"{what}: {error}")
            if isinstance(error, NcclError):
                raise
            raise NcclError(self.broken) from error
        self.watch.add(done(), f"{what} in group {self.name}", self.deadlines.finish, self.problem)

    def problem(self) -> str | None:
        """What NCCL has found wrong since, for instance that a peer died; asked from the watching thread."""
        state = self.library.state(self.comm)
        return None if state in (SUCCESS, IN_PROGRESS) else describe(self.library, self.comm, state)

    def break_off(self, reason: str) -> None:
        """Never use the communicator again, and stop what it does on the GPU, within the abort deadline."""
        if self.broken is None:
            self.broken = reason
            give_up(self.library, self.comm, self.deadlines.abort)

    def close(self) -> None:
        """Finish and free; every rank of the node calls it. A communicator that does not end in time is left alone."""
        if self.broken:
            return
        self.broken = "closed"
        try:
            self.library.finalize(self.comm)
            poll_until_done(self.library, self.comm, self.deadlines.abort, "closing")
            self.library.destroy(self.comm)
        except (NcclError, RuntimeError):
            give_up(self.library, self.comm, self.deadlines.abort)


def poll_until_done(library: Library, comm: Comm, seconds: float, what: str) -> None:
    """Wait until ``comm`` is done with what it was asked. Raises NcclError if it failed or takes longer."""
    begin = time.monotonic()
    while (state := library.state(comm)) == IN_PROGRESS:
        waited = time.monotonic() - begin
        if waited > seconds:
            raise NcclError(
                f"{what}: NCCL is still not ready after {seconds:g} s; a rank of the group did not come, or cannot "
                "be reached (NCCL_DEBUG=INFO shows how far it got)"
            )
        if waited > SPIN_SECONDS:
            time.sleep(1e-4)
    if state != SUCCESS:
        raise NcclError(f"{what}: {describe(library, comm, state)}")


def named(call: Callable[[], T]) -> T:
    """``call()``; what the library raises is the machine's failure, whose message is enough without a traceback."""
    try:
        return call()
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def describe(library: Library, comm: Comm, state: int) -> str:
    """NCCL's own words about a failure."""
    return f"NCCL result {state}: {library.last_error(comm) or 'no further word'}"


def give_up(library: Library, comm: Comm, seconds: float) -> bool:
    """Abort ``comm`` from a thread of its own and wait at most ``seconds``; whether it came to an end.

    ``ncclCommAbort`` may wait for ever, for a kernel that never ends or for a thread that is inside NCCL.
    """
    thread = threading.Thread(target=library.abort, args=(comm,), name="nccl-abort", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
