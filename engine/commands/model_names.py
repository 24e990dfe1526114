"""The folder of a model that is named as people name it: ``Qwen/Qwen3-30B-A3B``, or with ``@revision``.

The snapshot is looked for where Hugging Face's own tools keep it (``HF_HOME``, ``HF_HUB_CACHE``). Where there
is none, one rank of the job downloads it, unless ``HF_HUB_OFFLINE`` forbids that.
"""

import json
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed

NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.tiktoken")
"""The files of a repository that are fetched; code is not among them, and none is ever run."""
Fetch = Callable[..., str]


def find_checkpoint(comm: Communicator, given: Path, fetch: Fetch | None = None) -> Path:
    """Return the folder of the checkpoint that ``given`` is or names. Collective over ``comm``.

    Args:
        comm: All ranks of the job.
        given: A folder, or the name of a model.
        fetch: Downloads or finds a snapshot, as ``huggingface_hub.snapshot_download`` does.

    Raises:
        AgreedError: There is no such folder and no such model; the same on every rank.
    """
    found = agreed(comm, lambda: _present(given, fetch))
    if all(comm.all_gather_object(found is not None)):
        return found or given
    agreed(comm, lambda: _download(given, fetch) if comm.rank == 0 else None, patient=True)
    return agreed(comm, lambda: _require(given, fetch))


def _present(given: Path, fetch: Fetch | None) -> Path | None:
    """Return the folder, or None where it is the name of a model that is to be downloaded.

    What is neither is returned as it is; reading it says what is wrong.
    """
    if given.is_dir() or NAME.fullmatch(str(given)) is None or find_spec("huggingface_hub") is None:
        return given
    return _cached(given, fetch)


def _cached(given: Path, fetch: Fetch | None) -> Path | None:
    """Find the complete snapshot of the model ``given`` in the local cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(_snapshot(given, fetch, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        return None
    return path if _is_complete(path) else None


def _is_complete(path: Path) -> bool:
    """Return whether a snapshot has its config and every file of weights."""
    if not (path / "config.json").is_file():
        return False
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return (path / "model.safetensors").is_file()
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return True  # reading it says what is wrong
    return all((path / file).is_file() for file in files)


def _download(given: Path, fetch: Fetch | None) -> None:
    """Fetch the snapshot; raise ValueError of one line where that is forbidden or fails."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ValueError(
            f"{given}: no such directory, and no complete snapshot of a model of this name in "
            f"{constants.HF_HUB_CACHE}; HF_HUB_OFFLINE is set, so nothing is downloaded"
        )
    try:
        _snapshot(given, fetch)
    except Exception as error:  # noqa: BLE001 - of many types, none of which a user can tell apart
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"{given}: no such directory, and a model of this name could not be downloaded ({reason}); "
            "give a folder, or check name, network and HF_TOKEN"
        ) from None


def _require(given: Path, fetch: Fetch | None) -> Path:
    from huggingface_hub import constants

    found = _cached(given, fetch)
    if found is None:
        raise ValueError(
            f"{given}: rank 0 has its snapshot, but this rank finds none in {constants.HF_HUB_CACHE}; set "
            "HF_HOME to a folder that all nodes share"
        )
    return found


def _snapshot(given: Path, fetch: Fetch | None, **options: Any) -> str:
    from huggingface_hub import snapshot_download

    name = NAME.fullmatch(str(given))
    assert name is not None
    return (fetch or snapshot_download)(
        name["repository"],
        revision=name["revision"],
        allow_patterns=list(FILES),
        ignore_patterns=["*/*"],
        **options,
    )
