"""The layout of a window for one-sided exchanges, and the launches on it.

A window has three parts. Flags and the word ``broken`` come first. Then what is sent to experts: counts, ids,
weights and rows of all tokens. Then what comes home. A step lays out each of the last two as it needs them;
the parts themselves keep their places, because a peer may already store the next step's rows while this rank
still sums what came home.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from xpar.kernels.gpu.epochs import abort_kernel
from xpar.kernels.gpu.limits import MOST_RANKS
from xpar.kernels.gpu.one_sided_combine import home_kernel, rank_sum_kernel, weighted_home_kernel
from xpar.kernels.gpu.one_sided_dispatch import dispatch_kernel

FLAGS_BYTES = 4096
_BROKEN = 7 * MOST_RANKS  # index of the word among the flags, on a cache line of its own
_LABELS = 2 * MOST_RANKS  # words from the flags of a kind to the labels of its sources
_ALIGNED = 256
_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.int8}
FEW_TOKENS = 256
"""Up to this many tokens a rank, dispatch takes small blocks: latency counts, not bandwidth."""


@dataclass(frozen=True)
class Peers:
    """The memory of R ranks as one of them sees it, and what the kernels keep beside it.

    ``window`` [n] uint8: this rank's own; ``delta`` [R] int64: bytes from its address to rank r's. ``state``
    [2] int32: epochs reached, by kind; ``counters`` [2] int32: zeros between launches; ``limit`` [1] int64:
    nanoseconds that a kernel waits for its peers. ``status`` [6] int32, in host memory: see
    ``await_peers`` of :mod:`xpar.kernels.gpu.epochs`. ``front``: bytes of the window's second part.
    ``processors``: of the GPU, which launches are sized for. ``checks``: compare the labels of all exchanges.
    """

    rank: int
    window: Tensor
    delta: Tensor
    state: Tensor
    counters: Tensor
    limit: Tensor
    status: Tensor
    front: int
    processors: int = 4
    checks: bool = False

    @property
    def size(self) -> int:
        return self.delta.shape[0]

    @cached_property
    def words(self) -> Tensor:
        """The first part as int32: flags of each kind, then ``broken``."""
        return self.window[:FLAGS_BYTES].view(torch.int32)

    @cached_property
    def broken(self) -> Tensor:
        return self.words[_BROKEN : _BROKEN + 1]

    def flags(self, kind: int) -> Tensor:
        """[R] int32: the epoch of each source rank."""
        return self.words[kind * MOST_RANKS : kind * MOST_RANKS + self.size]

    def abort(self) -> None:
        """Have no rank wait any more, by a kernel on the current stream."""
        abort_kernel[(1,)](self.broken, self.delta, **self._abort_constants())

    def rehearse_abort(self) -> None:
        """Launch the kernel of :meth:`abort` on a word of its own, to have it compiled and loaded."""
        abort_kernel[(1,)](
            torch.zeros_like(self.broken), torch.zeros_like(self.delta), **self._abort_constants()
        )

    def _abort_constants(self) -> dict[str, int]:
        return {"R": self.size, "LANES": _lanes(self.size), "RANK": self.rank, "num_warps": 1}


@dataclass(frozen=True)
class Step:
    """The sizes of one exchange, the same on every rank.

    ``counts``: tokens of each rank. ``row_bytes``: of a row that travels to experts, ``width`` values of
    ``dtype`` are one that comes home. ``slots``: each slot comes home by itself, unsummed.
    """

    counts: tuple[int, ...]
    top_k: int
    row_bytes: int
    width: int
    dtype: torch.dtype
    slots: bool = False

    @cached_property
    def entries(self) -> int:
        """M, tokens of all ranks."""
        return sum(self.counts)

    @cached_property
    def most(self) -> int:
        return max(self.counts)

    @property
    def ids_bytes(self) -> int:
        return _round_up(4 * self.entries * self.top_k)

    @property
    def front_bytes(self) -> int:
        """Bytes that the window's second part must have."""
        return _round_up(8 * MOST_RANKS) + 2 * self.ids_bytes + _round_up(self.entries * self.row_bytes)

    @property
    def back_bytes(self) -> int:
        """Bytes that the window's third part must have."""
        places = self.most * (self.top_k if self.slots else len(self.counts))
        return _round_up(places * self.width * self.dtype.itemsize)


class Exchange:
    """The places of one step in the windows of ``peers``, and its launches.

    Each rank launches a dispatch and then one way home, with tokens or without, because every rank waits for
    all others in both. ``owner``, ``local`` [E] int32: ep rank of each expert and its index there; ``etp``
    consecutive ranks slice it.
    """

    def __init__(self, peers: Peers, step: Step) -> None:
        if peers.front < step.front_bytes or peers.window.numel() < _after(peers) + step.back_bytes:
            raise ValueError(f"{step} does not fit into a window of {peers.window.numel()} bytes")
        self.peers, self.step = peers, step
        entries, k, at = step.entries, step.top_k, FLAGS_BYTES

        def take(nbytes: int) -> Tensor:
            nonlocal at
            part = peers.window[at : at + nbytes]
            at += _round_up(nbytes)
            return part

        self.counts = take(8 * MOST_RANKS).view(torch.int32)
        self.topk_ids = take(4 * entries * k).view(torch.int32).view(entries, k)
        self.topk_weights = take(4 * entries * k).view(torch.float32).view(entries, k)
        self._rows = take(entries * step.row_bytes)
        self._back = peers.window[_after(peers) : _after(peers) + step.back_bytes]
        self.first = sum(step.counts[: peers.rank])
        self.tokens = step.counts[peers.rank]

    def rows(self, dtype: torch.dtype) -> Tensor:
        """[M, ...]: rows that arrive, as values of ``dtype``."""
        return self._rows.view(dtype).view(self.step.entries, self.step.row_bytes // dtype.itemsize)

    @property
    def back(self) -> Tensor:
        """The results at home, [R, T, H] flat, or [T, k, H] with ``slots``."""
        return self._back.view(self.step.dtype)

    def dispatch(
        self,
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        owner: Tensor,
        local: Tensor,
        etp: int = 1,
        label: int = 0,
    ) -> None:
        """Send own rows to the ranks of their experts, and wait for all ranks' rows.

        Args:
            x: rows [T, ...] of any dtype, contiguous; a row has the step's bytes.
            ids: [T, k] int32, contiguous, -1 for a dropped slot.
            weights: [T, k] float32, contiguous.
            owner: [E] int32, ep rank of each expert.
            local: [E] int32, index of each expert on its ep rank.
            etp: consecutive ranks that slice the experts of one ep rank.
            label: which exchange this is, see :func:`label_of`; the same on every rank.
        """
        words = _words(self.step.row_bytes)
        w = self.step.row_bytes // words.itemsize
        block = min(1024 if self.tokens <= FEW_TOKENS else 4096, triton.next_power_of_2(w))
        programs = self._programs(self.tokens * triton.cdiv(w, block), 1)
        dispatch_kernel[(programs,)](
            x.view(words),
            ids,
            weights,
            owner,
            local,
            self._rows.view(words),
            self.topk_ids,
            self.topk_weights,
            self.counts,
            *self._protocol(0, label),
            self.tokens,
            self.first,
            W=w,
            SHIFT=_shift(words),
            BLOCK=block,
            ETP=etp,
            K_LANES=_power(ids),
            num_warps=16 if block == 4096 else 8,
            **self._constants(),
        )

    def rows_home(self, outputs: Tensor, label: int = 0) -> None:
        """Send results ``outputs`` [M, H] home; with ``slots`` those of all slots, [M k, H]."""
        words = _words(outputs.shape[1] * outputs.element_size())
        w = outputs.shape[1] * outputs.element_size() // words.itemsize
        block = min(1024, triton.next_power_of_2(w))
        programs = self._programs(self.peers.size * self.step.most * triton.cdiv(w, block), 1)
        home_kernel[(programs,)](
            outputs.view(words),
            self.topk_ids,
            self._back.view(words),
            self.counts,
            *self._protocol(1, label),
            self.step.most,
            W=w,
            SHIFT=_shift(words),
            BLOCK=block,
            K_LANES=_power(self.topk_ids),
            SLOTS=self.step.slots,
            num_warps=8,
            **self._constants(),
        )

    def weighted_home(self, slots: Tensor, label: int = 0) -> None:
        """Send the weighted sums of each entry's slots home; ``slots`` [M k, H]: slot j of m at m k + j."""
        h = slots.shape[1]
        block = min(2048, triton.next_power_of_2(h))
        programs = self._programs(self.peers.size * self.step.most * triton.cdiv(h, block), 4)
        weighted_home_kernel[(programs,)](
            slots,
            self.topk_ids,
            self.topk_weights,
            self.back,
            self.counts,
            *self._protocol(1, label),
            self.step.most,
            H=h,
            SHIFT=_shift(slots.dtype),
            BLOCK=block,
            num_warps=8,
            **self._constants(),
        )

    def sum_ranks(
        self,
        ids: Tensor,
        owner: Tensor,
        etp: int = 1,
        *,
        shared: Tensor | None = None,
        residual: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Sum the ranks' results for each own token, in rank order; rounded once, and once for each addend.

        Args:
            ids: [T, k] int32 as they were sent.
            owner: [E] int32 as for :meth:`dispatch`.
            etp: as for :meth:`dispatch`.
            shared: [T, H] to be added, or None.
            residual: [T, H] to be added, or None.
            bias: [H] float32 to be added, or None.

        Returns:
            [T, H] in the step's dtype.
        """
        h = self.step.width
        out = torch.empty(self.tokens, h, dtype=self.step.dtype, device=self.peers.window.device)
        block = min(2048, triton.next_power_of_2(h))
        if self.tokens and h:
            rank_sum_kernel[(self._programs(self.tokens * triton.cdiv(h, block), 2),)](
                self.back,
                ids,
                owner,
                shared,
                residual,
                bias,
                out,
                self.tokens,
                K=self.step.top_k,
                K_LANES=_power(ids),
                H=h,
                BLOCK=block,
                R=self.peers.size,
                ETP=etp,
                num_warps=8,
            )
        return out

    def slots_at_home(self) -> Tensor:
        """[T k, H]: with ``slots``, each own slot's output, undefined where the slot was dropped."""
        return self.back[: self.tokens * self.step.top_k * self.step.width].view(-1, self.step.width)

    def _protocol(self, kind: int, label: int) -> tuple[Tensor | int, ...]:
        p = self.peers
        return (p.flags(kind), p.broken, p.delta, p.state, p.counters[kind:], p.status, label, p.limit)

    def _constants(self) -> dict[str, int | bool]:
        p = self.peers
        return {
            "K": self.step.top_k,
            "R": p.size,
            "LANES": _lanes(p.size),
            "RANK": p.rank,
            "CHECKS": _LABELS if p.checks else 0,
            "ASM": p.window.is_cuda,
        }

    def _programs(self, items: int, a_processor: int) -> int:
        return max(1, min(items, a_processor * self.peers.processors))


def window_bytes(front: int, back: int) -> int:
    """Bytes of a window whose second and third part have ``front`` and ``back``."""
    return FLAGS_BYTES + _round_up(front) + _round_up(back)


def _after(peers: Peers) -> int:
    return FLAGS_BYTES + peers.front


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _ALIGNED) * _ALIGNED


def _words(row_bytes: int) -> torch.dtype:
    """The largest type of word that a row consists of."""
    return next(dtype for size, dtype in _WORDS.items() if row_bytes % size == 0)


def _shift(dtype: torch.dtype) -> int:
    return dtype.itemsize.bit_length() - 1


def _power(ids: Tensor) -> int:
    return int(triton.next_power_of_2(ids.shape[1]))


def _lanes(size: int) -> int:
    return max(2, int(triton.next_power_of_2(size)))
