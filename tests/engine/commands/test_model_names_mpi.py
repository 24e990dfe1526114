"""Models named as on Hugging Face: found in its cache, downloaded once a job, or refused in one line."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from moe_families import CASES
from tiny_models import write_model

from xpar.comm import AgreedError, ProcessGrid, World
from xpar.engine.commands.model_names import find_checkpoint
from xpar.engine.models.loader import load_model

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm

pytestmark = pytest.mark.mpi(max_size=2)
COMMIT, OTHER = "a" * 40, "b" * 40
NAME = Path("some-lab/Tiny-MoE")


@pytest.fixture
def grid(comm: "Intracomm") -> ProcessGrid:
    return ProcessGrid.create(World.attach(comm))


@pytest.fixture(scope="module")
def model(comm: "Intracomm", tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    path = Path(comm.bcast(str(tmp_path_factory.mktemp("model"))))
    if comm.rank == 0:
        write_model(next(c for c in CASES if c.name == "olmoe"), path / "olmoe", torch.float32, 3)
    comm.barrier()
    return path / "olmoe"


@pytest.fixture
def cache(comm: "Intracomm", tmp_path: Path) -> Iterator[Path]:
    """A folder with a space and letters beyond ASCII in its name."""
    path = Path(comm.bcast(str(tmp_path))) / "große Modelle"
    if comm.rank == 0:
        path.mkdir()
    comm.barrier()
    yield path


def store(cache: Path, model: Path, commit: str = COMMIT, branch: str = "main") -> Path:
    """Store ``model`` as huggingface_hub does: symlinks to read-only blobs."""
    root = cache / "models--some-lab--Tiny-MoE"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for folder in ("blobs", "refs"):
        (root / folder).mkdir(exist_ok=True)
    (root / "refs" / branch).write_text(commit)
    for number, file in enumerate(sorted(model.iterdir())):
        blob = root / "blobs" / f"{commit[:4]}{number}"
        shutil.copy(file, blob)
        blob.chmod(0o444)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


def local(cache: Path) -> Callable[..., str]:
    from huggingface_hub import snapshot_download

    return partial(snapshot_download, cache_dir=cache)


def test_a_snapshot_in_the_cache_is_found_and_loaded(
    comm: "Intracomm", grid: ProcessGrid, cache: Path, model: Path
) -> None:
    if comm.rank == 0:
        store(cache, model)
        store(cache, model, OTHER, "v2")
    comm.barrier()
    for name, commit in ((NAME, COMMIT), (Path(f"{NAME}@v2"), OTHER), (Path(f"{NAME}@{OTHER}"), OTHER)):
        found = find_checkpoint(grid.world.comm, name, local(cache))
        assert found == cache / "models--some-lab--Tiny-MoE" / "snapshots" / commit
    assert load_model(found, grid).expert_bytes > 0


@pytest.mark.parametrize("left", [None, "config.json", "model.safetensors"])
def test_one_rank_downloads_what_is_missing(
    comm: "Intracomm", grid: ProcessGrid, cache: Path, model: Path, left: str | None
) -> None:
    """``left``: the only file that an interrupted download left behind."""
    downloads = []

    def fetch(repository: str, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            return local(cache)(repository, local_files_only=True, **options)
        assert repository == str(NAME) and "*.py" not in options["allow_patterns"]
        downloads.append(comm.rank)
        shutil.rmtree(cache / "models--some-lab--Tiny-MoE", ignore_errors=True)
        return str(store(cache, model))

    if comm.rank == 0 and left is not None:
        snapshot = store(cache, model)
        for file in snapshot.iterdir():
            if file.name != left:
                file.unlink()
    comm.barrier()
    assert (find_checkpoint(grid.world.comm, NAME, fetch) / "config.json").is_file()
    assert downloads == ([0] if comm.rank == 0 else [])


def test_offline_nothing_is_downloaded(
    grid: ProcessGrid, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AgreedError, match=r"some-lab/Tiny-MoE: no such directory.* HF_HUB_OFFLINE is set"):
        find_checkpoint(grid.world.comm, NAME, local(cache))


def test_a_download_that_fails_is_one_line(grid: ProcessGrid, cache: Path) -> None:
    def fetch(repository: str, local_files_only: bool = False, **options: Any) -> str:
        if local_files_only:
            return local(cache)(repository, local_files_only=True, **options)
        raise OSError("no route\nto host")

    with pytest.raises(AgreedError, match=r"not be downloaded \(no route to host\); give a folder") as e:
        find_checkpoint(grid.world.comm, NAME, fetch)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("given", ["model", "/no/such/folder", "a/b/c", "."])
def test_what_is_no_name_stays(grid: ProcessGrid, given: str) -> None:
    assert find_checkpoint(grid.world.comm, Path(given)) == Path(given)


def test_code_of_a_checkpoint_is_never_run(
    comm: "Intracomm", grid: ProcessGrid, cache: Path, model: Path
) -> None:
    path, trace = cache / "own code", cache / "was run"
    if comm.rank == 0:
        shutil.copytree(model, path)
        config = json.loads((path / "config.json").read_text())
        own = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
        (path / "config.json").write_text(json.dumps({**config, "model_type": "own_moe", "auto_map": own}))
        (path / "modeling_own.py").write_text(f"open({str(trace)!r}, 'w')\n")
    comm.barrier()
    with pytest.raises(AgreedError, match=r"'own_moe' .* no class for it; .*\(auto_map\) is never run") as e:
        load_model(path, grid)
    assert "\n" not in str(e.value) and not trace.exists()
