"""Epoch flags in memory that ranks map, by which kernels signal and await their peers.

R ranks. A rank has one flag for each source rank and kind of exchange (0: rows of tokens, 1: results). A flag
is an int32 epoch that only grows, so two epochs are compared by their signed difference, which survives the
wrap at 2**31.

Memory order: all threads of a program store their rows, ``tl.debug_barrier`` joins them, an acq_rel addition
at GPU scope orders the programs of the grid, and the last program releases the flags at system scope. The
peer acquires the flag at system scope, and the kernels that follow it on the same stream may read the rows.
No program waits before its whole grid has sent, and a grid has one program that waits: so kernels of two
ranks never wait for each other in a circle.

``ASM``: inline PTX, for GPUs. Without it Triton's interpreter runs the same code on processes that share host
memory.
"""

import triton
import triton.language as tl


@triton.jit
def wide(i):
    """Return ``i`` in 64 bits, also where the interpreter counts with Python's ints."""
    return tl.full((), 0, tl.int64) + i


@triton.jit
def load_acquire(flag, ASM: tl.constexpr):
    """Load the int32 at ``flag`` with acquire order at system scope, in every thread."""
    if ASM:
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.u32 $0, [$1];", "=r,l", [flag], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.atomic_add(flag, 0, sem="acquire", scope="sys")


@triton.jit
def read_clock(ASM: tl.constexpr):
    """Return the GPU's clock in nanoseconds; 0 in the interpreter, which counts turns instead."""
    if ASM:
        return tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
    else:
        return tl.full((), 0, tl.int64)


@triton.jit
def is_last_program(
    counter,  # int32 [1], device memory of this rank: programs of this launch that are done
    programs,  # number of programs of the launch
):
    """Count this program as done; true in the last one, which sees all programs' stores."""
    tl.debug_barrier()
    done = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if done == programs - 1:
        tl.store(counter, 0)
    return done == programs - 1


@triton.jit
def signal_peers(
    flags,  # int32 [R] of one kind in this rank's window, entry per source rank
    delta,  # int64 [R]: bytes from this rank's window to rank r's
    epoch,  # int32: what this rank's flag becomes at every peer, itself included
    R: tl.constexpr,  # ranks
    LANES: tl.constexpr,  # power of two, at least 2 and at least R
    RANK: tl.constexpr,  # this rank
):
    """Raise this rank's flag at all ranks, one lane each, with release order at system scope."""
    r = tl.arange(0, LANES)
    away = tl.load(delta + r, mask=r < R, other=0) >> 2
    value = epoch + tl.zeros((LANES,), tl.int32)
    tl.atomic_xchg(flags + RANK + away, value, mask=r < R, sem="release", scope="sys")


@triton.jit
def await_peers(
    flags,  # int32 [R] of one kind in this rank's window, entry per source rank
    epoch,  # int32: what every flag must have reached
    broken,  # int32 [1] in this rank's window: 0, or 1 + the rank that gave up
    status,  # int32 [6] in host memory: word of ``broken``, rank that is missing, epoch, kind, two labels
    label,  # int32: which exchange this is, for the host and for ``CHECKS``
    limit,  # int64 [1], device memory: nanoseconds to wait (turns in the interpreter)
    KIND: tl.constexpr,  # 0: rows of tokens, 1: results
    R: tl.constexpr,  # ranks
    RANK: tl.constexpr,  # this rank
    CHECKS: tl.constexpr,  # words from ``flags`` to the sources' labels, or 0: compare none
    ASM: tl.constexpr,  # inline PTX
):
    """Wait until every flag has reached ``epoch``, or ``limit`` is over, or a rank has given up.

    A wait that ends without its flag marks ``broken``, which stays set: every later wait then passes in its
    first turn. So does a source whose label differs from this rank's; the kind is then ``KIND`` + 2. The host
    is given the reason in ``status``. Nothing traps, because that would take the GPU's
    context and the report with it. Nothing with a barrier may follow in the kernel.
    """
    begin = read_clock(ASM)
    allowed = tl.load(limit)
    for r in tl.static_range(R):
        seen = load_acquire(flags + r, ASM)
        waits = (seen - epoch) < 0
        turns = tl.full((), 0, tl.int64)
        while waits:
            seen = load_acquire(flags + r, ASM)
            turns += 1
            elapsed = read_clock(ASM) - begin if ASM else turns
            gives_up = (elapsed > allowed) | (tl.load(broken, volatile=True) != 0)
            waits = ((seen - epoch) < 0) & (gives_up == 0)
        if (seen - epoch) < 0:
            word = tl.load(broken, volatile=True)
            if word == 0:
                word = tl.full((), 1 + RANK, tl.int32)
                tl.store(broken, word)
                tl.store(status + 1, r)
                tl.store(status + 2, epoch)
                tl.store(status + 3, KIND)
                tl.store(status + 4, label)
            tl.store(status, word)
        elif CHECKS > 0:
            other = tl.load(flags + CHECKS + r, volatile=True)
            if (other != label) & (tl.load(broken, volatile=True) == 0):
                tl.store(broken, tl.full((), 1 + RANK, tl.int32))
                tl.store(status + 1, r)
                tl.store(status + 2, epoch)
                tl.store(status + 3, KIND + 2)
                tl.store(status + 4, label)
                tl.store(status + 5, other)
                tl.store(status, tl.full((), 1 + RANK, tl.int32))


@triton.jit
def end_exchange(
    counter,  # int32 [1], device memory of this rank: programs of this launch that are done
    programs,  # number of programs of the launch
    flags,  # int32 [R] of kind KIND in this rank's window, entry per source rank
    delta,  # int64 [R]: bytes from this rank's window to rank r's
    epoch,  # int32: the epoch that this exchange reaches
    state,  # int32 [2], device memory: epochs reached, by kind
    broken,  # int32 [1] in this rank's window: 0, or 1 + the rank that gave up
    status,  # int32 [6] in host memory: see ``await_peers``
    label,  # int32: which exchange this is
    limit,  # int64 [1], device memory: nanoseconds to wait (turns in the interpreter)
    KIND: tl.constexpr,  # 0: rows of tokens, 1: results
    R: tl.constexpr,  # ranks
    LANES: tl.constexpr,  # power of two, at least 2 and at least R
    RANK: tl.constexpr,  # this rank
    CHECKS: tl.constexpr,  # words from ``flags`` to the sources' labels, or 0: compare none
    ASM: tl.constexpr,  # inline PTX
):
    """In the last program of a launch that has sent, signal all ranks and wait for their signals.

    Every program calls it as its last act: a barrier must not follow :func:`await_peers`.
    """
    if is_last_program(counter, programs):
        if CHECKS > 0:
            r = tl.arange(0, LANES)
            away = tl.load(delta + r, mask=r < R, other=0) >> 2
            tl.store(flags + CHECKS + RANK + away, label + tl.zeros((LANES,), tl.int32), mask=r < R)
            tl.debug_barrier()
        signal_peers(flags, delta, epoch, R, LANES, RANK)
        tl.store(state + KIND, epoch)
        await_peers(flags, epoch, broken, status, label, limit, KIND, R, RANK, CHECKS, ASM)


@triton.jit
def abort_kernel(
    broken,  # int32 [1] in this rank's window: 0, or 1 + the rank that gave up
    delta,  # int64 [R]: bytes from this rank's window to rank r's
    R: tl.constexpr,  # ranks
    LANES: tl.constexpr,  # power of two, at least 2 and at least R
    RANK: tl.constexpr,  # this rank
):
    """Mark every rank's window as broken by this rank, which ends all waiting; grid (1,)."""
    r = tl.arange(0, LANES)
    away = tl.load(delta + r, mask=r < R, other=0) >> 2
    value = tl.full((LANES,), 1 + RANK, tl.int32)
    tl.atomic_xchg(broken + away, value, mask=r < R, sem="release", scope="sys")
