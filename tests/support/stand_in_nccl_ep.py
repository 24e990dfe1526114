"""NCCL's EP extension on host memory over MPI, with the argument checks and the freedoms of the real one.

The calls are those of ``nccl-extensions`` 0.1.0 (low latency, rank-major). What it leaves undefined is here
as bad as it may be: rows of a source arrive in any order, rows and weights that nobody sent are NaN, and
results are added in the order in which ranks first stand among a token's experts.
"""

import random
import sys
from dataclasses import dataclass, field
from enum import IntEnum
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class NcclInvalid(Exception):
    """As the bindings raise; the real library aborts the process in most of these cases."""


def require(condition: bool, rule: str) -> None:
    if not condition:
        raise NcclInvalid(rule)


class Algorithm(IntEnum):
    LOW_LATENCY = 0
    HIGH_THROUGHPUT = 1


class Layout(IntEnum):
    UNSET = 0
    EXPERT_MAJOR = 1
    RANK_MAJOR = 2
    FLAT = 3


class ExpertIdKind(IntEnum):
    AUTO = 0
    LOCAL = 1
    GLOBAL = 2


class Tensor:
    def __init__(self, buffer: torch.Tensor) -> None:
        require(buffer.is_contiguous(), "the bindings read any tensor as contiguous")
        self.buffer = buffer

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.buffer.shape)


@dataclass(kw_only=True)
class GroupConfig:
    algorithm: Algorithm = Algorithm.LOW_LATENCY
    num_experts: int = 0
    max_dispatch_tokens_per_rank: int = 0
    max_token_bytes: int = 0
    enable_mask: bool = False
    timeout_ns: int = 0


@dataclass(kw_only=True)
class LayoutInfo:
    src_rank_counters: Tensor | None = None
    recv_topk_idx_kind: ExpertIdKind = ExpertIdKind.AUTO


@dataclass(kw_only=True)
class DispatchInputs:
    tokens: Tensor | None = None
    topk_weights: Tensor | None = None
    scales: Tensor | None = None


@dataclass(kw_only=True)
class DispatchOutputs:
    tokens: Tensor | None = None
    topk_weights: Tensor | None = None
    scales: Tensor | None = None
    topk_idx: Tensor | None = None


@dataclass(kw_only=True)
class CombineInputs:
    tokens: Tensor | None = None
    topk_weights: Tensor | None = None
    scales: Tensor | None = None


@dataclass(kw_only=True)
class CombineOutputs:
    tokens: Tensor | None = None
    topk_weights: Tensor | None = None


class Group:
    def __init__(self, mpi: Any, config: GroupConfig) -> None:
        self.mpi, self.config, self.is_alive = mpi, config, True
        self.local_experts = config.num_experts // mpi.size

    @classmethod
    def create(cls, comm: "Communicator", config: GroupConfig) -> "Group":
        mpi, size = comm.ptr.mpi, comm.ptr.mpi.size
        require(comm.ptr.blocking, "calls of the communicator return before they are done: exit(1)")
        require(config.algorithm == Algorithm.LOW_LATENCY, "a stand-in for low latency alone")
        require(
            config.max_dispatch_tokens_per_rank > 0, "max_dispatch_tokens_per_rank must be greater than 0"
        )
        require(config.max_token_bytes > 0, "max_token_bytes must be greater than 0")
        require(config.num_experts > 0, "num_experts must be greater than 0")
        require(config.num_experts % size == 0, "num_experts % nRanks == 0")
        require(
            len(set(mpi.allgather(repr(config)))) == 1,
            "max_dispatch_tokens_per_rank is not alike on all ranks",
        )
        NOTES.append(("group", config))
        return cls(mpi, config)

    def create_handle(self, layout: Layout, topk_idx: Tensor, *, stream: int) -> "Handle":
        require(self.is_alive, "Cannot create_handle: Group is not initialized or has been destroyed")
        require(layout == Layout.RANK_MAJOR, "a stand-in for the rank-major layout alone")
        rows = self.config.max_dispatch_tokens_per_rank * self.local_experts
        require(rows % 4 == 0, "TMA requires the number of tokens to be multiple of 4")
        k = topk_idx.sizes[1]
        require(1 <= k <= min(self.config.num_experts, 31), f"LL top-k {k} must be in [1, ...]")
        require(len(set(self.mpi.allgather(k))) == 1, "ranks create handles of different top-k")
        NOTES.append(("handle", k))
        return Handle(self, topk_idx)

    def destroy(self) -> None:
        require(self.is_alive, "destroyed twice")
        self.mpi.Barrier()
        self.is_alive = False
        NOTES.append(("destroy group",))


class Handle:
    def __init__(self, group: Group, topk_idx: Tensor) -> None:
        self.group, self.is_alive, self.k = group, True, topk_idx.sizes[1]
        self.sent: list[list[int]] | None = None
        self.update(topk_idx, stream=0)

    def update(self, topk_idx: Tensor, *, stream: int) -> None:
        require(self.is_alive and self.group.is_alive, "Cannot update: Handle is not initialized")
        require(
            topk_idx.buffer.dtype in (torch.int32, torch.int64), "topk_idx must be ncclInt32 or ncclInt64"
        )
        require(topk_idx.buffer.ndim == 2 and topk_idx.sizes[1] == self.k, "LL: num_topk mismatch")
        experts = self.group.config.num_experts
        require(bool(((topk_idx.buffer >= -1) & (topk_idx.buffer < experts)).all()), "an expert that is none")
        self.ids = topk_idx.buffer

    def dispatch(
        self,
        inputs: DispatchInputs,
        outputs: DispatchOutputs,
        *,
        layout_info: LayoutInfo | None = None,
        stream: int,
    ) -> None:
        require(self.is_alive and self.group.is_alive, "Cannot dispatch: Handle is not initialized")
        require(self.sent is None, "a second dispatch before the first one's combine")
        config, size, most = (
            self.group.config,
            self.group.mpi.size,
            self.group.config.max_dispatch_tokens_per_rank,
        )
        assert (
            inputs.tokens
            and outputs.tokens
            and inputs.topk_weights
            and outputs.topk_weights
            and outputs.topk_idx
        )
        x, weights = inputs.tokens.buffer, inputs.topk_weights.buffer
        tokens, width = x.shape
        require(x.dtype in DTYPES and outputs.tokens.buffer.dtype == x.dtype, "tokens has unsupported dtype")
        require(tokens == len(self.ids) and tokens <= most, "x->sizes[0] == handle->num_tokens <= the most")
        require(width * x.element_size() <= config.max_token_bytes, "rows wider than max_token_bytes")
        require(width * x.element_size() % 1024 == 0, "Invalid hidden")
        require(x.data_ptr() % 16 == 0, "rows are read 16 bytes at a time")
        require(weights.dtype == torch.float32 and weights.shape == (tokens, self.k), "topk_weights")
        require(outputs.tokens.sizes == (size, most, width), "recv_x is [nRanks, max tokens, hidden]")
        for tensor, dtype in ((outputs.topk_weights, torch.float32), (outputs.topk_idx, torch.int32)):
            require(tensor.sizes == (size, most, self.k) and tensor.buffer.dtype == dtype, "recv_topk_*")
        kind = ExpertIdKind.AUTO if layout_info is None else layout_info.recv_topk_idx_kind
        require(kind == ExpertIdKind.LOCAL, "AUTO may change; GLOBAL is not what the caller reads")
        ranks = torch.where(self.ids >= 0, self.ids // self.group.local_experts, -1)
        going = [(ranks == r).any(1).nonzero()[:, 0].tolist() for r in range(size)]
        for rows in going:
            random.shuffle(rows)
        self.sent = going
        parcels = [(x[rows], self.ids[rows], weights[rows]) for rows in going]
        self._arrive(self.group.mpi.alltoall(parcels), outputs)
        NOTES.append(("dispatch", tokens))

    def _arrive(self, parcels: list[Any], outputs: DispatchOutputs) -> None:
        assert outputs.tokens and outputs.topk_weights and outputs.topk_idx
        first = self.group.mpi.rank * self.group.local_experts
        outputs.tokens.buffer.fill_(float("nan"))
        outputs.topk_weights.buffer.fill_(float("nan"))
        outputs.topk_idx.buffer.fill_(-1)
        self.counts = [len(rows) for rows, _, _ in parcels]
        for source, (rows, ids, weights) in enumerate(parcels):
            local = ids - first
            here = (ids >= 0) & (local >= 0) & (local < self.group.local_experts)
            outputs.tokens.buffer[source, : len(rows)] = rows
            outputs.topk_idx.buffer[source, : len(rows)] = torch.where(here, local, -1).to(torch.int32)
            outputs.topk_weights.buffer[source, : len(rows)] = weights

    def combine(self, inputs: CombineInputs, outputs: CombineOutputs, *, stream: int) -> None:
        require(self.is_alive and self.group.is_alive, "Cannot combine: Handle is not initialized")
        require(self.sent is not None, "combine before dispatch")
        assert inputs.tokens and outputs.tokens and self.sent is not None
        x, out, size = inputs.tokens.buffer, outputs.tokens.buffer, self.group.mpi.size
        require(x.dtype in DTYPES and out.dtype == x.dtype, "combine unsupported token dtype")
        require(x.shape[:2] == (size, self.group.config.max_dispatch_tokens_per_rank), "x is 3D")
        require(out.shape == (len(self.ids), x.shape[2]), "out->sizes[0] == num_combined_tokens")
        require(x.shape[2] * x.element_size() % 1024 == 0, "Invalid hidden")
        back = self.group.mpi.alltoall([x[r, : self.counts[r]] for r in range(size)])
        home = [dict(zip(rows, made, strict=True)) for rows, made in zip(self.sent, back, strict=True)]
        for token, ids in enumerate(self.ids.tolist()):
            ranks = dict.fromkeys(e // self.group.local_experts for e in ids if e >= 0)  # in order
            total = torch.zeros(x.shape[2])
            for rank in ranks:
                total += home[rank][token].float()
            out[token] = total.to(x.dtype)
        self.sent = None
        NOTES.append(("combine", len(self.ids)))

    def destroy(self) -> None:
        require(self.is_alive and self.group.is_alive, "destroyed twice, or after its group")
        self.is_alive = False
        NOTES.append(("destroy handle",))


class Communicator:
    """Stands for ``nccl.core.Communicator``, which wraps one of the low-level bindings."""

    device_api_support, n_lsa_teams, gin_type = True, 2, 3

    def __init__(self, ptr: Any) -> None:
        self.ptr = ptr


NOTES: list[tuple[Any, ...]] = []
"""What was asked, in order."""


@dataclass
class Installed:
    """The stand-in as modules ``nccl.ep`` and ``nccl.core``; ``release``: of the extension."""

    release: str = "0.2.0"
    names: tuple[str, ...] = (
        *(
            "Algorithm",
            "CombineInputs",
            "CombineOutputs",
            "DispatchInputs",
            "DispatchOutputs",
            "ExpertIdKind",
        ),
        *("Group", "GroupConfig", "Handle", "Layout", "LayoutInfo", "Tensor"),
    )
    notes: list[tuple[Any, ...]] = field(default_factory=lambda: NOTES)

    def put(self, monkeypatch: pytest.MonkeyPatch) -> None:
        NOTES.clear()
        package, ep, core = (ModuleType(name) for name in ("nccl", "nccl.ep", "nccl.core"))
        for module in (package, ep, core):
            module.__spec__ = ModuleSpec(module.__name__, None)
            monkeypatch.setitem(sys.modules, module.__name__, module)
        package.ep, package.core = ep, core  # type: ignore[attr-defined]
        core.Communicator = Communicator  # type: ignore[attr-defined]
        for name in self.names:
            setattr(ep, name, globals()[name])
        ep.get_lib_version = lambda: self.release  # type: ignore[attr-defined]


def properties(major: int = 9, minor: int = 0, processors: int = 132, uuid: str = "GPU-0") -> Any:
    """What torch says of a GPU."""
    return SimpleNamespace(
        name="H200" if major == 9 else "A100",
        major=major,
        minor=minor,
        uuid=uuid,
        multi_processor_count=processors,
    )
