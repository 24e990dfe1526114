"""One NCCL communicator: started over MPI, with deadlines, given up without other ranks."""

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
"""seconds for which a state is polled without pause: most operations start within microseconds"""


class NcclCommunicator:
    """A non-blocking NCCL communicator that is ready for use; make it with :meth:`connect`.

    Each call waits until NCCL has launched the operation, never until the operation is done. NCCL
    launches a group from another thread, and waiting for that keeps its kernel in its place on the
    stream.
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
        """Make the NCCL communicator of ``group``; collective.

        ``blocking``: whether NCCL's calls block. Raises AgreedError, the same on every rank, if a rank
        cannot join.
        """
        doing = f"NCCL for group {group.name}"
        ids = agreed(group, lambda: os_error_from(library.unique_id) if group.rank == 0 else b"", doing)
        unique_id: bytes = group.all_gather_object(ids)[0]

        def join() -> Comm:
            comm = os_error_from(lambda: library.init(group.size, group.rank, unique_id, blocking))
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
        """Issue NCCL calls as one operation.

        Args:
            what: Name of the operation, for messages.
            calls: Makes the calls.
            done: Makes, afterwards, the marker that the :class:`Watch` follows.

        Raises:
            NcclError: NCCL failed. The communicator is broken then, and its operations are given up.
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
        """Return what NCCL has found wrong since, such as a dead peer; None if all is well.

        Called from the thread of the :class:`Watch`.
        """
        state = self.library.state(self.comm)
        return None if state in (SUCCESS, IN_PROGRESS) else describe(self.library, self.comm, state)

    def break_off(self, reason: str) -> None:
        """Give the communicator up for ``reason``, and stop its work within the abort deadline."""
        if self.broken is None:
            self.broken = reason
            give_up(self.library, self.comm, self.deadlines.abort)

    def close(self) -> None:
        """Finish and free the communicator; called by every rank of the group.

        A communicator that does not end in time is left alone.
        """
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
    """Wait until ``comm`` has done ``what``; NcclError if that failed or takes longer."""
    begin = time.monotonic()
    while (state := library.state(comm)) == IN_PROGRESS:
        waited = time.monotonic() - begin
        if waited > seconds:
            raise NcclError(
                f"{what}: NCCL is still not ready after {seconds:g} s; a rank of the group did not come, or "
                "cannot be reached (NCCL_DEBUG=INFO shows how far it got)"
            )
        if waited > SPIN_SECONDS:
            time.sleep(1e-4)
    if state != SUCCESS:
        raise NcclError(f"{what}: {describe(library, comm, state)}")


def os_error_from(call: Callable[[], T]) -> T:
    """Return ``call()``, and raise its exceptions as OSError.

    An error of NCCL is the machine's failure, whose message says enough without a traceback.
    """
    try:
        return call()
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def describe(library: Library, comm: Comm, state: int) -> str:
    """Return NCCL's own words about the failure ``state`` of ``comm``."""
    return f"NCCL result {state}: {library.last_error(comm) or 'no further word'}"


def give_up(library: Library, comm: Comm, seconds: float) -> bool:
    """Abort ``comm`` in another thread and wait at most ``seconds``; whether the abort ended.

    ``ncclCommAbort`` may wait for ever, for a kernel that never ends or for a thread inside NCCL.
    """
    thread = threading.Thread(target=library.abort, args=(comm,), name="nccl-abort", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()
