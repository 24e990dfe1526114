"""One NCCL communicator: started over MPI, with deadlines, given up without other ranks."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from xpar.comm.communicator import Communicator
from xpar.comm.device.nccl_library import IN_PROGRESS, SUCCESS, Comm, Library, NcclError, version_text
from xpar.comm.device.watch import Watch
from xpar.comm.failure import agreed
from xpar.comm.watchdog.deadlines import Deadlines

T = TypeVar("T")
SPIN_SECONDS = 1e-3
"""seconds for which a state is polled without pause: most operations start within microseconds"""


class NcclCommunicator:
    """An NCCL communicator that is ready for use; make it with :meth:`connect`.

    Each call waits until NCCL has launched the operation, never until the operation is done. Where NCCL's
    calls do not block, NCCL launches a group from another thread, and waiting for that keeps its kernel in
    its place on the stream. Where they block, the calling thread launches, which takes half the time, and
    the thread of the :class:`Watch` enforces the deadline of a launch by ending the job.

    Attributes:
        blocking: Whether NCCL's calls block.
        on_trial: Whether somebody else enforces the deadline of a launch.
    """

    def __init__(
        self,
        library: Library,
        comm: Comm,
        group: Communicator,
        deadlines: Deadlines,
        watch: Watch,
        blocking: bool = False,
    ) -> None:
        self.library, self.comm, self.deadlines, self.watch = library, comm, deadlines, watch
        self.rank, self.size, self.name = group.rank, group.size, group.name
        self.blocking, self.on_trial = blocking, False
        self.broken: str | None = None
        self._inside: int | None = None

    @classmethod
    def connect(
        cls,
        library: Library,
        group: Communicator,
        deadlines: Deadlines,
        watch: Watch,
        device: torch.device,
        blocking: bool = False,
    ) -> "NcclCommunicator":
        """Make the NCCL communicator of ``group``; collective.

        ``blocking``: whether NCCL's calls block; a rank that then cannot join in time leaves a thread behind
        that waits. Raises AgreedError, the same on every rank, if a rank cannot join.
        """
        doing = f"NCCL for group {group.name}"
        ids = agreed(group, lambda: os_error_from(library.unique_id) if group.rank == 0 else b"", doing)
        unique_id: bytes = group.all_gather_object(ids)[0]

        def init() -> Comm:
            return library.init(group.size, group.rank, unique_id, blocking)

        def join() -> Comm:
            if blocking:
                what = f"joining group {group.name}"
                return os_error_from(lambda: call_in_time(init, deadlines.connect, what, device))
            comm = os_error_from(init)
            try:
                poll_until_done(library, comm, deadlines.connect, f"joining group {group.name}")
            except NcclError as error:
                give_up(library, comm, deadlines.abort)
                raise OSError(f"{error} (NCCL {version_text(library.version())})") from None
            return comm

        return cls(library, agreed(group, join, doing), group, deadlines, watch, blocking)

    def run(
        self,
        what: str,
        calls: Callable[[], None],
        done: Callable[[], Callable[[], bool] | None],
        grouped: bool = True,
    ) -> None:
        """Issue NCCL calls as one operation.

        Args:
            what: Name of the operation, for messages.
            calls: Makes the calls.
            done: Makes, afterwards, the marker that the :class:`Watch` follows.
            grouped: Whether there may be several calls, or one that is no collective.

        Raises:
            NcclError: NCCL failed. The communicator is broken then, and its operations are given up.
        """
        if self.broken:
            raise NcclError(f"{what}: group {self.name} is broken since: {self.broken}")
        self._inside = threading.get_ident()
        try:
            if self.blocking:
                self._launch(what, calls, grouped)
            else:
                self._issue(calls, grouped=True)
                poll_until_done(self.library, self.comm, self.deadlines.launch, what)
        except Exception as error:
            self._inside = None
            self.break_off(f"{what}: {error}")
            if isinstance(error, NcclError):
                raise
            raise NcclError(self.broken) from error
        self._inside = None
        self.watch.add(done(), what, self.deadlines.finish, self.problem, self.name)

    def _launch(self, what: str, calls: Callable[[], None], grouped: bool) -> None:
        if self.on_trial:
            return self._issue(calls, grouped)
        self.watch.begin_launch(what, self.deadlines.launch, self.name)
        try:
            self._issue(calls, grouped)
        finally:
            self.watch.end_launch()

    def _issue(self, calls: Callable[[], None], grouped: bool) -> None:
        if not grouped:
            return calls()
        self.library.group_start()
        try:
            calls()
        finally:
            self.library.group_end()

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
            if self._inside in (None, threading.get_ident()):  # NCCL allows no abort under a running call
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


def call_in_time(call: Callable[[], T], seconds: float, what: str, device: torch.device) -> T:
    """Return ``call()``, made in another thread; NcclError if it takes longer, and the thread is left alone.

    Its exceptions are raised here.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # each thread has its own
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised in the thread that waits
            errors.append(error)

    thread = threading.Thread(target=work, name="nccl-call", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise NcclError(
            f"{what}: NCCL is still not ready after {seconds:g} s; a rank of the group did not come"
        )
    return results[0]


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
