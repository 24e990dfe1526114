"""What reaches NCCL's bindings, and what is said where they are missing; without a GPU."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from xpar.comm.device.nccl_library import SUCCESS, open_library, version_text


class Recorder(ModuleType):
    """Stands for ``nccl.bindings.nccl``: every function notes its name and arguments."""

    def __init__(self) -> None:
        super().__init__("nccl.bindings.nccl")
        self.calls: list[tuple[Any, ...]] = []
        self.Config = lambda: SimpleNamespace(blocking=None, ptr=77)
        self.answers: dict[str, Any] = {"get_version": 22809, "get_unique_id": b"u" * 128}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any) -> Any:
            self.calls.append((name, *args))
            answer = self.answers.get(name, SUCCESS)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


@pytest.fixture
def bindings(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    module, package = Recorder(), ModuleType("nccl.bindings")
    package.nccl = module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nccl", ModuleType("nccl"))
    monkeypatch.setitem(sys.modules, "nccl.bindings", package)
    return module


def test_calls_reach_the_bindings_with_bytes_and_addresses(bindings: Recorder) -> None:
    library = open_library()
    bindings.calls.clear()
    assert library.unique_id() == b"u" * 128
    library.init(4, 3, b"u" * 128, False)
    library.send(1000, 24, 2, "comm", 5)
    library.recv(2000, 8, 1, "comm", 5)
    library.all_gather(1000, 2000, 24, "comm", 5)
    library.all_to_all(1000, 2000, 24, "comm", 5)
    assert bindings.calls == [
        ("get_unique_id",),
        ("comm_init_rank_scalable", 4, 3, 1, bytearray(b"u" * 128), 77),
        ("send", 1000, 24, 1, 2, "comm", 5),
        ("recv", 2000, 8, 1, 1, "comm", 5),
        ("all_gather", 1000, 2000, 24, 1, "comm", 5),
        ("allto_all", 1000, 2000, 24, 1, "comm", 5),
    ]


def test_what_is_missing_of_nccl_is_said_with_its_remedy(
    bindings: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    bindings.answers["get_version"] = 22212
    with pytest.raises(ValueError, match=r"NCCL 2.22.12 at .* is too old; 2.23.0 or newer is needed"):
        open_library()
    bindings.answers["get_version"] = RuntimeError("No such file: libnccl.so.2\nmore")
    with pytest.raises(ValueError, match=r"there is no NCCL library: No such file: libnccl.so.2$"):
        open_library()
    monkeypatch.setitem(sys.modules, "nccl.bindings", None)
    with pytest.raises(ValueError, match="pip install --no-deps nccl4py cuda-pathfinder"):
        open_library()


def test_versions_are_readable() -> None:
    assert [version_text(v) for v in (22809, 23003, 22300)] == ["2.28.9", "2.30.3", "2.23.0"]
