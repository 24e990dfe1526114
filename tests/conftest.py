"""Which tests a run takes, what its random inputs are, and the session that spans MPI ranks.

``pytest`` runs the tests without the mark ``mpi``; ``mpirun -n N python -m mpi4py -m pytest --with-mpi`` runs
those that have it, except where ``mpi(min_size=…, max_size=…)`` leaves N out, or ``mpi(min_nodes=…,
max_nodes=…)`` the number of nodes that MPI sees (``mpirun -hosts a:2,b:1`` shows it two on one machine).
Tests with the mark stand in files named ``*_mpi.py``: ranks read no others, which would take each of them
seconds. Nothing here imports MPI in a serial run: a process that has initialised MPI hands its environment to
every ``mpirun`` below it.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import Phase, settings

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

SEED = pytest.StashKey[int]()
SIZE = pytest.StashKey[int]()
NODES = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="seed of the random inputs; drawn afresh when not given")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Prepare the run before any plugin is configured with its options."""
    # A worker of pytest-xdist must collect the tests that its controller named.
    given = getattr(config, "workerinput", {}).get("seed", config.getoption("--seed"))
    seed = random.SystemRandom().randrange(2**31) if given is None else given
    config.stash[SIZE], config.stash[NODES] = 0, 0
    if config.getoption("--with-mpi", default=False):
        from mpi_session import MPISession

        session = MPISession()
        config.pluginmanager.register(session, "xpar-mpi-session")
        config.stash[SIZE], config.stash[NODES] = session.comm.size, session.num_nodes()
        seed = session.comm.bcast(seed)
        share_examples(config, seed)
    config.stash[SEED] = seed


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "mpi(min_size=1, max_size=None, min_nodes=1, max_nodes=None, deadline=60): runs on every rank of a "
        "--with-mpi "
        "run of a fitting size; deadline in seconds",
    )


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput["seed"] = node.config.stash[SEED]


def share_examples(config: pytest.Config, seed: int) -> None:
    """Let hypothesis draw the same examples on every rank, and not shrink: ranks would shrink apart."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = str(seed)
    settings.register_profile(
        "mpi",
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        report_multiple_bugs=False,
    )
    settings.load_profile("mpi")


def pytest_report_header(config: pytest.Config) -> list[str]:
    nodes = f" on {config.stash[NODES]} nodes" if config.stash[NODES] > 1 else ""
    ranks = (
        f"MPI, n = {config.stash[SIZE]}{nodes}"
        if config.stash[SIZE]
        else "serial (tests marked mpi left out)"
    )
    return [f"run: {ranks}, --seed {config.stash[SEED]}"]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out of a run of ranks what cannot hold tests for it; None lets pytest's own rules decide."""
    others = collection_path.suffix == ".py" and not collection_path.stem.endswith("_mpi")
    return True if others and config.stash[SIZE] else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.stash[SIZE] == 0:
        refuse_unread(items)
    fits = [belongs(item, config.stash[SIZE], config.stash[NODES]) for item in items]
    kept = [item for item, fit in zip(items, fits, strict=True) if fit]
    left_out = [item for item, fit in zip(items, fits, strict=True) if not fit]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def refuse_unread(items: list[pytest.Item]) -> None:
    """A test that no run of ranks would read must not be lost in silence."""
    for item in items:
        if item.get_closest_marker("mpi") and not item.path.stem.endswith("_mpi"):
            raise pytest.UsageError(f"{item.nodeid} has the mark mpi; move it to a file named *_mpi.py")


def belongs(item: pytest.Item, size: int, nodes: int) -> bool:
    """Whether ``item`` runs on ``size`` ranks of ``nodes`` nodes; size 0 is a run without MPI."""
    mark = item.get_closest_marker("mpi")
    if mark is None or size == 0:
        return mark is None and size == 0
    return within(mark, "size", size) and within(mark, "nodes", nodes)


def within(mark: pytest.Mark, what: str, value: int) -> bool:
    """Whether ``value`` lies within the mark's ``min_`` and ``max_`` of ``what``."""
    most = mark.kwargs.get(f"max_{what}")
    return bool(mark.kwargs.get(f"min_{what}", 1) <= value and (most is None or value <= most))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fresh_seed" in metafunc.fixturenames:
        seed = metafunc.config.stash[SEED]
        metafunc.parametrize("fresh_seed", [seed], ids=[f"seed{seed}"], scope="session")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Give torch one thread: small products of several processes would wait for each other's threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def comm() -> "Iterator[Intracomm]":
    """A duplicate of ``MPI.COMM_WORLD`` that belongs to the tests."""
    from mpi4py import MPI

    duplicate = MPI.COMM_WORLD.Dup()
    yield duplicate
    duplicate.Free()
