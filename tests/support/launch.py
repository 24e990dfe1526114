"""Start an MPI job from a test, with a deadline, and leave no process behind."""

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

# What a launcher or a resource manager tells its own ranks: a job below must not take it for itself.
INHERITED = ("PMI_", "PMIX_", "HYDRA_", "HYDI_", "MPI_LOCAL", "MPIEXEC_", "OMPI_", "PRTE_", "SLURM_")
TAG = "XPAR_TEST_JOB"
PROGRAMS = Path(__file__).parent.parent / "programs"
ALONE = ["unshare", "--user", "--map-root-user", "--mount"]
"""Runs a command with mounts that nobody else sees, where :func:`can_mount`."""


def mpirun(
    n: int,
    command: str | Sequence[str],
    *,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run ``command`` on ``n`` ranks of this machine and return its exit status and what it printed.

    ``command``: Python source, run by ``python -m mpi4py -c``, or the words of a command (``sys.executable``
    first for Python). ``timeout``: seconds until every process of the job is killed and TimeoutError raised
    with what was printed so far. ``env``: added to this process's environment, less the launchers' variables.
    """
    words = [sys.executable, "-m", "mpi4py", "-c", command] if isinstance(command, str) else list(command)
    tag = uuid.uuid4().hex
    with subprocess.Popen(
        [find_mpirun(), "-n", str(n), *words],
        env=clean_environment() | {TAG: tag} | dict(env or {}),
        cwd=cwd,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as job:
        try:
            out, err = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            kill_tagged(tag)
            out, err = job.communicate()
            raise TimeoutError(
                f"{words} on {n} ranks: not finished after {timeout:g} s\n{out}\n{err}"
            ) from None
        finally:
            kill_tagged(tag)
    return subprocess.CompletedProcess(words, job.returncode, out, err)


def python_program(name: str, *arguments: str) -> list[str]:
    """Return the words that run ``tests/programs/NAME.py`` with ``arguments``."""
    return [sys.executable, str(PROGRAMS / f"{name}.py"), *arguments]


def support_on_path() -> dict[str, str]:
    """Return the environment in which a program finds the modules beside this one."""
    known = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([*([known] if known else []), str(Path(__file__).parent)])}


def find_mpirun() -> str:
    """The launcher of the library that mpi4py is told to use, or beside this interpreter, as that library.

    Else PATH's.
    """
    library = os.environ.get("MPI4PY_LIBMPI")
    beside = (Path(library).parent.parent / "bin" if library else Path(sys.executable).parent) / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise FileNotFoundError(f"no mpirun beside {sys.executable} nor on PATH; install xpar[mpich]")
    return found


def clean_environment() -> dict[str, str]:
    """This process's environment as a job of its own should see it: no launcher above, no network, one
    thread."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(INHERITED)}
    return kept | {
        "OMP_NUM_THREADS": "1",
        "HYDRA_LAUNCHER": "fork",
        "HYDRA_RMK": "user",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_rmaps_default_binding_policy": "none",
    }


def can_mount() -> bool:
    """Whether this machine lets a process have mounts of its own."""
    return shutil.which(ALONE[0]) is not None and not subprocess.run([*ALONE, "true"], check=False).returncode


def kill_tagged(tag: str) -> None:
    """Kill what is left of a job: launchers give their ranks sessions of their own, so no group holds them
    all."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{TAG}={tag}".encode() in (entry / "environ").read_bytes():
                os.kill(int(entry.name), signal.SIGKILL)
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
