"""Keys and values of all running sequences in one pool of a GPU, each sequence's side by side.

N blocks of P tokens; Hk key heads, D numbers of a key and D' of a value; T tokens and B sequences of a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from xpar.engine.models.kv_pool import BLOCK_TOKENS, FlatTokens, LayerForm
from xpar.kernels.gpu.availability import has_triton
from xpar.kernels.gpu.span_attention import SpanAttention, SpanRows


@dataclass(frozen=True)
class SpanStep:
    """The sequences of one step, ``rows``, and the places [T] int64 of its tokens in the pool."""

    rows: SpanRows
    places: Tensor


class SpanPool:
    """Keys and values [(N + 1) P, Hk, D] of each layer, zeros at first.

    Values are padded to the width of keys. The last block is that of rows that hold no sequence.

    Args:
        forms: Of each layer that keeps something.
        blocks: N.
        device: Where the pool lies.
        attention: What reads it.
    """

    def __init__(
        self, forms: Sequence[LayerForm], blocks: int, device: torch.device, attention: SpanAttention
    ) -> None:
        self.forms, self.blocks, self.device, self.attention = tuple(forms), blocks, device, attention
        self._has_kernel = has_triton()
        self.keys, self.values = (
            [
                torch.zeros(
                    (blocks + 1) * BLOCK_TOKENS, form.heads, form.key_width, dtype=form.dtype, device=device
                )
                for form in self.forms
            ]
            for _ in range(2)
        )

    @property
    def nowhere(self) -> int:
        """The place of the token of a row that holds no sequence."""
        return self.blocks * BLOCK_TOKENS

    def write(self, layer: int, keys: Tensor, values: Tensor, step: SpanStep) -> None:
        """Write the step's keys [1, Hk, T, D] and values [1, Hk, T, D'] to their places."""
        if keys.is_cuda and self._has_kernel:
            from xpar.kernels.gpu.small_steps import write_spans

            write_spans(keys[0], values[0], self.keys[layer], self.values[layer], step.places)
            return
        for pool, new in ((self.keys[layer], keys), (self.values[layer], values)):
            rows = new[0].transpose(0, 1)
            if rows.shape[-1] < pool.shape[-1]:
                rows = functional.pad(rows, (0, pool.shape[-1] - rows.shape[-1]))
            pool.index_copy_(0, step.places, rows)

    def attend(
        self,
        layer: int,
        query: Tensor,
        step: SpanStep,
        scale: float,
        sinks: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        """Compute the attention of ``query`` [T, Hq, D] to what is in ``layer``'s pool: [T, Hq, D']."""
        form = self.forms[layer]
        keys, values = self.keys[layer], self.values[layer]
        out = self.attention(query, keys, values, step.rows, scale, form.window, sinks, softcap)
        return out[..., : form.value_width]

    def step(self, tokens: FlatTokens) -> SpanStep:
        """Bring the numbers of a step to the device."""
        counts = np.diff(tokens.query_starts)
        firsts = tokens.blocks[:, 0].astype(np.int64) * BLOCK_TOKENS
        rows = SpanRows(
            self._brought(tokens.query_starts, torch.int32),
            self._brought(np.append(firsts, 0), torch.int32),
            self._brought(tokens.lengths, torch.int32),
            int(counts.max()),
            int(tokens.lengths.max()),
        )
        return SpanStep(rows, self._brought(tokens.places, torch.int64))

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, each given by its number and that of the copy."""
        source, target = self._brought(np.array(pairs, np.int64).reshape(-1, 2).T, torch.int64)
        for pool in (*self.keys, *self.values):
            blocks = pool.view(-1, BLOCK_TOKENS, *pool.shape[1:])
            blocks.index_copy_(0, target, blocks[source])

    def _brought(
        self, numbers: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]", dtype: torch.dtype
    ) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(dtype).to(self.device, non_blocking=True)
