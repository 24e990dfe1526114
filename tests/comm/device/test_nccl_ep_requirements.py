"""What NCCL's EP extension needs, and the reason against each rank that lacks some of it."""

import inspect
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import stand_in_nccl_ep
import torch

from xpar.comm.device import nccl_ep_requirements
from xpar.comm.device.nccl_ep_exchange import NcclEpExchange, RowShape
from xpar.comm.device.nccl_ep_requirements import (
    NcclEpFacts,
    collect_nccl_ep_facts,
    why_no_nccl_ep,
    why_not_rows,
)
from xpar.comm.watchdog.deadlines import Deadlines

GPU = torch.device("cuda", 0)
FINE = NcclEpFacts("a", "GPU-0", 132, "NCCL EP 0.2.0", None)
SIXTEEN = [replace(FINE, host=f"node {r // 8}", uuid=f"GPU-{r}") for r in range(16)]


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (SIXTEEN, None),
        (SIXTEEN[:1], None),
        ([SIXTEEN[0], replace(SIXTEEN[8], problem="no nvcc")], "rank 1: no nvcc"),
        ([replace(f, problem="the extension is not installed") for f in SIXTEEN], "the extension is not"),
        (
            [SIXTEEN[0], replace(SIXTEEN[8], versions="NCCL EP 0.3.0")],
            "have different versions: NCCL EP 0.2.0; ",
        ),
        ([FINE, FINE], "ranks 0, 1 share GPU GPU-0; each needs one of its own"),
        ([replace(f, host="a") for f in SIXTEEN], "16 ranks on a; the extension is for at most 8 a node"),
        (SIXTEEN[:12], "the nodes have 8, 4 ranks; it needs as many on each"),
        (
            [replace(FINE, host=f"node {r // 8}", uuid=f"GPU-{r}") for r in range(72)],
            "72 ranks; the extension is for at most 64",
        ),
    ],
    ids=str,
)
def test_who_is_refused(facts: list[NcclEpFacts], reason: str | None) -> None:
    found = why_no_nccl_ep(facts)
    assert found is None if reason is None else found is not None and reason in found


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ((132, 256, 8, 7168, torch.bfloat16), None),
        ((132, 256, 8), None),
        ((132, 128, 8, 2048, torch.float16), None),
        (
            (132, 256, 8, 2880, torch.bfloat16),
            "rows of 2880 values in bfloat16; their width must be a multiple of 512",
        ),
        ((132, 256, 8, 100, torch.bfloat16), "must be a multiple of 512"),
        ((132, 256, 8, 14336, torch.bfloat16), "rows of 14336 values in bfloat16; they may have 13824"),
        ((132, 64, 8, 7168, torch.float32), "they may have 6912"),
        ((132, 64, 8, 4096, torch.float32), None),
        (
            (132, 64, 8, 4096, torch.float8_e4m3fn),
            "rows in float8_e4m3fn; it moves bfloat16, float16, float32",
        ),
        ((132, 64, 31, 2048, torch.bfloat16), None),
        (
            (132, 64, 32, 2048, torch.bfloat16),
            "32 experts a token; 64 experts on 132 multiprocessors leave 31",
        ),
        ((132, 300, 30), "30 experts a token; 300 experts on 132 multiprocessors leave 29"),
        ((132, 1849, 8), "1849 experts; 132 multiprocessors serve at most 1848"),
        ((132, 1400, 8, 13312, torch.bfloat16), "they may have 10752"),
    ],
    ids=str,
)
def test_which_rows_are_refused(wanted: tuple[Any, ...], reason: str | None) -> None:
    found = why_not_rows(*wanted)
    assert found is None if reason is None else found is not None and reason in found


class Machine:
    """A machine that has all that is needed, until a test takes something away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.patch, self.folder, self.extension = monkeypatch, folder, stand_in_nccl_ep.Installed()
        self.nccl, self.bindings, self.gpu = 23007, "0.6.0", stand_in_nccl_ep.properties()
        self.extension.put(monkeypatch)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: self.gpu)
        monkeypatch.setattr(nccl_ep_requirements, "open_library", lambda: self)
        monkeypatch.setattr(nccl_ep_requirements, "version", lambda name: self.bindings)
        cuda = ModuleType("cuda")
        cuda.bindings = ModuleType("cuda.bindings")  # type: ignore[attr-defined]
        cuda.bindings.__version__ = "13.2.0"
        monkeypatch.setitem(sys.modules, "cuda", cuda)
        for name in (
            "NCCL_EP_JIT_NVCC",
            "NVCC",
            "CUDA_PATH",
            "NCCL_EP_JIT_BUILD_INCLUDE_DIR",
            "NCCL_DEV_API_JIT",
        ):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("CUDA_HOME", str(folder))
        monkeypatch.setenv("NCCL_HOME", str(folder))
        monkeypatch.setenv("PATH", "/bin:/usr/bin")
        self.put("include/nccl_device.h", "")
        self.compiler("13.1")

    def version(self) -> int:
        return self.nccl

    def put(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
        return path

    def compiler(self, release: str) -> Path:
        return self.put(
            "bin/nvcc", f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n"
        )


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def test_a_machine_with_everything(machine: Machine) -> None:
    facts = collect_nccl_ep_facts(GPU)
    assert facts.problem is None and facts.processors == 132 and facts.uuid == "GPU-0"
    assert facts.versions == "NCCL EP 0.2.0, nccl4py 0.6.0, NCCL 2.30.7, CUDA 13"
    machine.nccl = 23203
    machine.patch.setenv("NCCL_DEV_API_JIT", "1")
    assert collect_nccl_ep_facts(GPU).problem is None
    other = machine.put("other/nvcc", (machine.folder / "bin/nvcc").read_text())
    machine.patch.delenv("CUDA_HOME")
    machine.patch.setenv("NVCC", str(other))
    assert collect_nccl_ep_facts(GPU).problem is None


def take_away(machine: Machine, what: str) -> None:
    if what == "extension":
        for name in ("nccl", "nccl.ep"):
            machine.patch.setitem(sys.modules, name, None)
    elif what == "its library":
        machine.patch.setattr(sys.modules["nccl.ep"], "get_lib_version", lambda: 1 / 0)
    elif what == "its release":
        machine.extension.release = "0.1.0"
    elif what == "new bindings":
        machine.bindings = "0.4.1"
    elif what == "new nccl":
        machine.nccl = 22809
    elif what == "old nccl":
        machine.nccl = 23203
    elif what == "headers":
        (machine.folder / "include/nccl_device.h").unlink()
    elif what == "nvcc":
        (machine.folder / "bin/nvcc").unlink()
    elif what == "named nvcc":
        machine.patch.setenv("NCCL_EP_JIT_NVCC", "/nowhere/nvcc")
    elif what == "nvcc that runs":
        machine.put("bin/nvcc", "#!/bin/sh\nexit 3\n")
    elif what == "the same CUDA":
        machine.compiler("12.8")
    elif what == "hopper":
        machine.gpu = stand_in_nccl_ep.properties(8, 0)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("extension", "the extension is not installed; pip install --no-deps nccl-extensions"),
        ("its library", "the extension cannot be loaded: division by zero"),
        ("its release", "NCCL EP 0.1.0 is too old; 0.2 is needed"),
        ("new bindings", "nccl4py 0.4.1 is too old; 0.5 is needed"),
        ("new nccl", "NCCL 2.28.9 is too old; 2.30.7 is needed"),
        (
            "old nccl",
            "NCCL 2.32.3 is newer than 2.30.7, for which the extension was built; set NCCL_DEV_API_JIT=1",
        ),
        ("headers", "with which the extension compiles its kernels; set NCCL_HOME"),
        ("nvcc", "no nvcc, with which the extension compiles its kernels at run time; set CUDA_HOME"),
        ("named nvcc", "no /nowhere/nvcc, with which the extension compiles its kernels"),
        ("nvcc that runs", "bin/nvcc does not run: Command"),
        ("the same CUDA", "nvcc is of CUDA 12 and cuda.bindings of CUDA 13; they must be alike"),
        ("hopper", "A100 has compute capability 8.0; 9.0 (Hopper) is needed"),
    ],
)
def test_what_is_missing_is_named(machine: Machine, what: str, reason: str) -> None:
    take_away(machine, what)
    problem = collect_nccl_ep_facts(GPU).problem
    assert problem is not None and reason in problem


# Where the extension is installed, the stand-in is held against it; docs/gpu.md says how to install it.
try:
    from nccl import ep
except ImportError:
    ep = None
if ep is not None:

    def test_the_stand_in_has_the_calls_of_the_extension() -> None:
        """The same names, arguments and numbers."""
        for name in stand_in_nccl_ep.Installed.names:
            real, ours = getattr(ep, name), getattr(stand_in_nccl_ep, name)
            if is_dataclass(ours):
                assert {f.name for f in fields(ours)} <= {f.name for f in fields(real)}
                continue
            if hasattr(ours, "__members__"):
                assert ours.__members__.items() <= real.__members__.items() == ours.__members__.items()
                continue
            for method in ("create", "create_handle", "update", "dispatch", "combine", "destroy"):
                if hasattr(ours, method):
                    taken = inspect.signature(getattr(real, method)).parameters
                    for parameter in inspect.signature(getattr(ours, method)).parameters.values():
                        assert taken[parameter.name].kind == parameter.kind, (name, method, parameter)

    def test_the_extension_takes_what_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
        """Its own types of arguments are made of this program's, up to its library."""
        calls: dict[str, tuple[Any, ...]] = {}
        handle = SimpleNamespace(
            update=lambda ids, *, stream: calls.update(update=(ids, stream)),
            dispatch=lambda i, o, *, layout_info, stream: calls.update(dispatch=(i, o, layout_info, stream)),
            combine=lambda i, o, *, stream: calls.update(combine=(i, o, stream)),
        )
        group = SimpleNamespace(
            create_handle=lambda layout, ids, *, stream: calls.update(create=(layout,)) or handle
        )
        monkeypatch.setattr(
            ep.Group, "create", lambda comm, config: calls.update(group=(comm.ptr, config)) or group
        )
        nccl: Any = SimpleNamespace(
            size=2, comm=77, deadlines=Deadlines(), run=lambda what, call, done, grouped: call()
        )
        exchange = NcclEpExchange(nccl, torch.device("cpu"), RowShape(32, 3, 4, 512, torch.bfloat16), False)
        x, ids, weights = (
            torch.ones(5, 512).bfloat16(),
            torch.zeros(5, 3, dtype=torch.int64),
            torch.ones(5, 3),
        )
        for _ in range(2):
            rows, arrived, factors = exchange.dispatch(x, ids, weights)
        assert exchange.combine(rows, 5).shape == (5, 512)
        assert (rows.shape, arrived.shape, factors.shape) == ((64, 512), (64, 3), (64, 3))
        pointer, config = calls["group"]
        assert pointer == 77 and config.num_experts == 8 and config.max_token_bytes == 1024
        assert config.timeout_ns == 1_200_000_000_000 and calls["create"] == (ep.Layout.RANK_MAJOR,)
        inputs, outputs, layout, stream = calls["dispatch"]
        assert inputs.tokens.sizes == (5, 512) and outputs.tokens.sizes == (2, 32, 512)
        assert outputs.topk_idx.sizes == outputs.topk_weights.sizes == (2, 32, 3) and stream == 0
        assert layout.recv_topk_idx_kind == ep.ExpertIdKind.LOCAL and layout.src_rank_counters is None
        made, home, _ = calls["combine"]
        assert made.tokens.sizes == (2, 32, 512) and home.tokens.sizes == (5, 512)
