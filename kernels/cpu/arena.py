"""Weight memory whose addresses are never used twice in one process.

zentorch packs weights in place on first use and remembers by address that it did. Memory that went back to the
allocator and came again with other weights would be taken for packed and give wrong results without an error, and
forgetting every address would break the kernels that still live. So a retired arena gives its pages back to
the system and keeps only its range of addresses.
"""

import mmap
import weakref
from math import prod

import torch
from torch import Tensor

_retired: list[mmap.mmap] = []


class Arena:
    """``nbytes`` of zeroed private memory, handed out in order by :meth:`take`; pages go back with the arena."""

    def __init__(self, nbytes: int) -> None:
        self._memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._used = 0
        weakref.finalize(self, _retire, self._memory)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next piece of the arena as a tensor; it must not outlive the arena."""
        count = prod(shape)
        tensor = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=self._used)
        self._used += count * dtype.itemsize
        return tensor.view(shape)


def _retire(memory: mmap.mmap) -> None:
    memory.madvise(mmap.MADV_DONTNEED)
    _retired.append(memory)
