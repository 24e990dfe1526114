"""A Slurm cluster of this machine's own and its jobs, from a test: deadlines everywhere, nothing left
behind."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch import clean_environment

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts" / "slurm"
LOCAL_CLUSTER = SCRIPTS / "local_cluster.sh"
# Their addresses are short. The long ones of the default go through Slurm's PMI in pieces, which now and then
# it fails to put together ("value not properly terminated in client request"); the ranks then wait for ever.
SHORT_ADDRESSES = {"MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp"}
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def local_cluster(verb: str, directory: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run the script; its exit status is the caller's to judge."""
    # Daemons must not hold a pipe of ours open: what they say goes to their logs.
    return subprocess.run(
        [str(LOCAL_CLUSTER), verb, str(directory)],
        env=clean_environment() | settings,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def until(condition: Callable[[], object], seconds: float, what: Callable[[], str]) -> float:
    """Wait until ``condition`` holds and return how long it took.

    TimeoutError with ``what()`` after ``seconds``.
    """
    begin = time.monotonic()
    while not condition():
        if time.monotonic() - begin > seconds:
            raise TimeoutError(f"not within {seconds:g} s: {what()}")
        time.sleep(0.1)
    return time.monotonic() - begin


@dataclass(frozen=True)
class Job:
    """``name``: as Slurm shows it, 17 or 17_3. ``output``: the file with what it printed."""

    cluster: "Cluster"
    name: str
    output: Path

    def record(self) -> str:
        return self.cluster.run("scontrol", "--oneliner", "show", "job", self.name)

    def field(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", self.record())
        assert found, f"{name} in {self.record()}"
        return found.group(1)

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def account(self) -> str:
        """What it printed, and what the cluster knows of it: the text of a failed test.

        Ranks that still run say first where they are.
        """
        if self.field("JobState") == "RUNNING":
            self.cluster.run("scancel", "--signal=USR1", self.name)
            time.sleep(5)
        return f"{self.text()}\n{self.record()}\n{self.cluster.account()}"

    def wait(self, seconds: float = 90) -> str:
        """Its final state, COMPLETED or another of :data:`OVER`.

        A test is ended without a word after 120 s, so that the deadline here is shorter.
        """
        until(lambda: self.field("JobState") in OVER, seconds, self.account)
        return self.field("JobState")

    def wait_for(self, words: str, seconds: float = 90) -> None:
        """Until it has printed ``words``."""
        until(lambda: words in self.text(), seconds, lambda: f"{words!r} in\n{self.account()}")


@dataclass(frozen=True)
class Cluster:
    """``env``: the environment in which sbatch, srun … talk to it."""

    env: Mapping[str, str]

    def run(self, *words: str, cwd: Path | None = None, **settings: str) -> str:
        done = subprocess.run(
            words,
            env={**self.env, **settings},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def account(self) -> str:
        """Jobs, nodes with the reason why one is not used, and the last lines of every daemon's log."""
        logs = Path(self.env["SLURM_CONF"]).parent / "log"
        tails = (f"{path.name}: {line}" for path in sorted(logs.iterdir()) for line in last_lines(path))
        return "\n".join([self.run("squeue"), self.run("sinfo", "--Node", "--format=%N %T %E"), *tails])

    def cancel_all(self) -> None:
        """End every job, so that what one test left behind does not keep the next one waiting."""
        if self.run("squeue", "--noheader"):
            self.run("scancel", "--user", str(os.getuid()))
            until(lambda: not self.run("squeue", "--noheader"), 30, self.account)

    def submit(
        self, script: str, *words: str, cwd: Path, options: tuple[str, ...] = (), **settings: str
    ) -> Job:
        """Submit the shipped batch script of that name in ``cwd``.

        ``settings`` are added to its environment.
        """
        output = cwd / "job.out"
        command = ["sbatch", "--parsable", f"--output={output}", *options, str(SCRIPTS / script), *words]
        name = self.run(*command, cwd=cwd, **settings).strip()
        return Job(self, name, output)


def last_lines(path: Path, count: int = 12) -> list[str]:
    """The last ``count`` lines of a log."""
    return path.read_text(errors="replace").splitlines()[-count:]


@contextmanager
def stopping(directory: Path) -> Iterator[None]:
    """Stop the cluster in ``directory`` after the body of the ``with``, and even if this process is killed in
    it."""
    # Waits for the end of its standard input, which comes with the end of this process at the latest.
    keeper = subprocess.Popen(
        ["bash", "-c", 'cat >/dev/null; exec "$0" stop "$1"', str(LOCAL_CLUSTER), str(directory)],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        yield
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        status = keeper.wait(timeout=60)
    assert status == 0, "the cluster did not stop"


@contextmanager
def running_cluster(directory: Path, path: str, **settings: str) -> Iterator[Cluster]:
    """A cluster in ``directory`` for the body of the ``with``; ``path``: the PATH of its jobs."""
    with stopping(directory):
        started = local_cluster("start", directory, **settings)
        assert started.returncode == 0, started.stderr
        conf = re.fullmatch(r"export SLURM_CONF=(\S+)\n", started.stdout)
        assert conf, started.stdout
        yield Cluster({**clean_environment(), **SHORT_ADDRESSES, "PATH": path, "SLURM_CONF": conf.group(1)})


def processes_with(setting: str) -> list[int]:
    """Processes of this machine that were started with ``NAME=value`` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and setting.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
    return sorted(found)


def venv_path(*first: Path) -> str:
    """A PATH with ``first`` in front, then this interpreter's commands, then the machine's."""

    return os.pathsep.join([*map(str, first), str(Path(sys.executable).parent), os.environ["PATH"]])
