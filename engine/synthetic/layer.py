"""A layer with random weights that need not be stored.

The weights of each expert are drawn from the seed and the expert's id. So every rank draws only the experts
it holds, and a reference can draw any expert again.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from xpar.engine.architectures.layer_weights import (
    LatentWeights,
    LayerWeights,
    NormWeights,
    RouterWeights,
    SharedWeights,
    Sink,
    make_router,
)
from xpar.engine.architectures.mlp_weights import ALL, MlpTensors
from xpar.engine.config import LayerConfig
from xpar.engine.layer.reference import InputEmulation, chosen_experts, slot_order_sum_reference
from xpar.engine.routing.router import Router
from xpar.engine.synthetic.values import fill_random
from xpar.kernels.contracts import Routing
from xpar.kernels.quantisation import quantise
from xpar.kernels.quantised_weight import QuantisedWeight, WeightFormat
from xpar.kernels.reference import mlp


class SyntheticLayer:
    """The random weights of one layer.

    Experts have gate and up [2I, H], gate rows first, or [I, H] without a gate, and down [H, I]. Biases,
    correction bias, expert scale and the table of token ids exist if the configuration has them. With a
    ``weight_format`` the routed experts are those weights quantised to it.
    """

    def __init__(
        self, config: LayerConfig, dtype: torch.dtype, seed: int, weight_format: WeightFormat | None = None
    ) -> None:
        self.config, self.dtype, self.seed, self.weight_format = config, dtype, seed, weight_format
        # Drawing is fast, quantising is not.
        self._quantised: dict[int, tuple[QuantisedWeight, QuantisedWeight]] = {}

    def expert(self, expert: int) -> tuple[Tensor, Tensor]:
        """Draw ``gate_up`` and ``down`` of a global expert id, the same at every call.

        Quantised weights are returned as the float32 numbers that they stand for.
        """
        if self.weight_format is not None:
            gate_up, down = self.quantised(expert, self.weight_format)
            return gate_up.dequantise(), down.dequantise()
        return self._mlp(expert, self.config.intermediate_size, self.config.routed_size)

    def quantised(self, expert: int, weight_format: WeightFormat) -> tuple[QuantisedWeight, QuantisedWeight]:
        """Draw ``gate_up`` and ``down`` of a global expert id in ``weight_format``."""
        if expert not in self._quantised:
            gate_up, down = self._mlp(expert, self.config.intermediate_size, self.config.routed_size)
            self._quantised[expert] = quantise(gate_up, weight_format), quantise(down, weight_format)
        return self._quantised[expert]

    def biases(self, expert: int) -> tuple[Tensor, Tensor] | None:
        """Draw the biases [2I] or [I], and [H], of a global expert id; None without biases."""
        c = self.config
        if not c.bias:
            return None
        packed = self._draw("gate_up_bias", 2 * expert, 1, c.activation.gate_up_rows(c.intermediate_size))
        return packed[0], self._draw("down_bias", 2 * expert + 1, 1, c.routed_size)[0]

    def shared(self) -> SharedWeights | None:
        """Draw the shared experts as one MLP; None without shared experts."""
        shared = self.config.shared
        if shared is None:
            return None
        gate = (
            self._draw("shared_expert_gate.weight", -3, 1, self.config.hidden_size) if shared.gated else None
        )
        return SharedWeights(*self._mlp(-2, shared.intermediate_size, self.config.hidden_size), gate)

    def latent(self) -> LatentWeights | None:
        """Draw the projections around the routed experts; None without a latent space."""
        hidden, latent = self.config.hidden_size, self.config.latent_size
        if latent is None:
            return None
        return LatentWeights(
            self._draw("fc1_latent_proj", -5, latent, hidden),
            self._draw("fc2_latent_proj", -6, hidden, latent),
        )

    def norm(self) -> NormWeights | None:
        """Draw the scale of the routed experts' norm; None without a norm."""
        if self.config.router.norm_eps is None:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        return NormWeights(torch.rand(self.config.hidden_size, generator=generator) + 0.5)

    def router(self) -> RouterWeights:
        """Draw the gate and the other tensors of the router."""
        c, r = self.config, self.config.router
        generator = torch.Generator().manual_seed(self.seed)
        correction = torch.randn(c.num_logits, generator=generator) * 0.01
        scale = torch.rand(c.num_logits, generator=generator) + 0.5
        keys = torch.rand(r.vocabulary, c.num_logits, generator=generator)
        return RouterWeights(
            self._draw("mlp.gate.weight", -1, c.num_logits, c.hidden_size),
            correction if r.correction_bias else None,
            self._draw("gate_bias", -7, 1, c.num_logits)[0] if r.gate_bias else None,
            scale if r.expert_scale else None,
            keys.topk(r.top_k, dim=-1).indices if r.choice == "hash" else None,
        )

    def output_bias(self) -> Tensor | None:
        """Draw the bias [H] of the output; None without that bias."""
        return (
            self._draw("output_bias", -8, 1, self.config.hidden_size)[0] if self.config.output_bias else None
        )

    def make_router(self) -> Router:
        """Make the router by itself, as a reference uses it."""
        return make_router(self.router(), self.config)

    def read(
        self,
        *,
        experts: Sequence[int],
        sink: Sink,
        dtype: torch.dtype,
        width_slice: slice = ALL,
        shared_slice: slice = ALL,
        as_codes: bool = False,
    ) -> LayerWeights:
        """Draw what ``layer_weights.load_layer_weights`` reads, with its arguments.

        ``dtype`` is not used: the weights have the dtype of the layer. ``as_codes``: True if ``sink`` takes
        weights in ``weight_format``.
        """
        for index, expert in enumerate(experts):
            if as_codes and self.weight_format is not None:
                weights: tuple[Any, ...] = self._whole(
                    *self.quantised(expert, self.weight_format), width_slice
                )
            else:
                weights = self._sliced(*self.expert(expert), width_slice)
            sink(index, *weights, *self._sliced_biases(expert, width_slice))
        shared = self.shared()
        if shared is not None:
            shared = SharedWeights(*self._sliced(shared.gate_up, shared.down, shared_slice), shared.gate)
        return LayerWeights(self.router(), shared, self.output_bias(), self.latent(), self.norm())

    def reference(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None = None,
        emulation: InputEmulation | None = None,
    ) -> tuple[Tensor, Routing]:
        """Compute the layer in float32, one expert at a time: the output [T, H], and the routing.

        ``emulation``: how inputs of routed experts are quantised, or None.
        """
        routing = self.make_router().route(hidden_states, None, input_ids)
        experts = ((e, MlpTensors(*self.expert(e), *(self.biases(e) or ()))) for e in chosen_experts(routing))
        weights = (self.shared(), self.config, self.output_bias(), self.latent(), self.norm())
        compute = emulation or mlp
        total = slot_order_sum_reference(hidden_states, routing, experts, *weights, compute=compute)
        return total, routing

    def nbytes(self) -> int:
        """Return the bytes of all experts together, shared experts included."""
        c = self.config
        shapes = (
            (c.activation.gate_up_rows(c.intermediate_size), c.routed_size),
            (c.routed_size, c.intermediate_size),
        )
        weight_format, size = self.weight_format, self.dtype.itemsize
        routed = sum(n * k * size if weight_format is None else weight_format.nbytes(n, k) for n, k in shapes)
        shared = 3 * c.shared.intermediate_size * c.hidden_size if c.shared else 0
        return c.num_experts * routed + (shared + 2 * c.hidden_size * (c.latent_size or 0)) * size

    def _mlp(self, number: int, width: int, hidden: int) -> tuple[Tensor, Tensor]:
        gate_up = self._draw("gate_up_proj", 2 * number, self.config.activation.gate_up_rows(width), hidden)
        return gate_up, self._draw("down_proj", 2 * number + 1, hidden, width)

    def _draw(self, name: str, number: int, rows: int, columns: int) -> Tensor:
        tensor = torch.empty(rows, columns, dtype=self.dtype)
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + number) % 2**63)
        fill_random(name, tensor, generator)
        return tensor

    def _whole(self, gate_up: QuantisedWeight, down: QuantisedWeight, part: slice) -> tuple[Any, ...]:
        if range(self.config.intermediate_size)[part] != range(self.config.intermediate_size):
            raise ValueError(f"random weights in {gate_up.format} are not sliced: use etp=1")
        return gate_up, down

    def _sliced(self, gate_up: Tensor, down: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        halves = gate_up.chunk(2 if self.config.activation.gated else 1)
        return torch.cat([half[part] for half in halves]), down[:, part]

    def _sliced_biases(self, expert: int, part: slice) -> tuple[Tensor, ...]:
        """Slice the biases; the down bias is not zero in the first slice alone, as it counts once."""
        biases = self.biases(expert)
        if biases is None:
            return ()
        packed, down = biases
        halves = packed.chunk(2 if self.config.activation.gated else 1)
        return torch.cat([half[part] for half in halves]), down if part.start in (
            None,
            0,
        ) else down * 0
