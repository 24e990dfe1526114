"""The expert layers that are measured, and their random weights and inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from xpar.comm.failure import AgreedError
from xpar.kernels.contracts import Activation, ExpertInput, ExpertKernel, ExpertSpec
from xpar.kernels.gpu.availability import why_unavailable

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}

_SILU = Activation("silu")
_GPT_OSS = Activation("silu", limit=7.0, alpha=1.702, beta=1.0)


@dataclass(frozen=True)
class LayerCase:
    """The expert layer of a model, as one GPU has it.

    ``hidden``: H. ``width``: I. ``experts``: number of experts on this GPU, of ``of`` in the model.
    ``top_k``: number of experts that each token chooses among all of the model's.
    """

    name: str
    hidden: int
    width: int
    experts: int
    top_k: int
    of: int
    activation: Activation = _SILU
    bias: bool = False

    def spec(self, dtype: torch.dtype, device: str = "cuda", row_invariant: bool = False) -> ExpertSpec:
        """Make the description of the layer that a kernel is chosen by."""
        return ExpertSpec(
            self.experts, self.hidden, self.width, dtype, self.activation, device, row_invariant, self.bias,
            routed_experts=self.of,
        )  # fmt: skip


LAYERS = {
    layer.name: layer
    for layer in (
        LayerCase("olmoe", 2048, 1024, 64, 8, 64),
        LayerCase("qwen3-30b", 2048, 768, 128, 8, 128),
        LayerCase("mixtral", 4096, 14336, 8, 2, 8),
        LayerCase("gpt-oss", 2880, 2880, 128, 4, 128, _GPT_OSS, bias=True),
        LayerCase("qwen3-235b", 4096, 1536, 128, 8, 128),
        LayerCase("deepseek-v3-slice", 7168, 2048, 64, 8, 256),
        LayerCase("deepseek-v3-64", 7168, 2048, 64, 8, 64),
    )
}


@dataclass(frozen=True)
class Weights:
    """The weights of a layer.

    ``gate_up`` [E, 2I, H]. ``down`` [E, H, I]. ``biases`` [E, 2I] and [E, H], or none.
    """

    gate_up: Tensor
    down: Tensor
    biases: tuple[Tensor, ...]


def random_weights(spec: ExpertSpec, g: torch.Generator) -> Weights:
    """Draw weights that keep the variance of unit inputs."""
    e, h, i = spec.num_experts, spec.hidden_size, spec.intermediate_size
    packed = spec.activation.gate_up_rows(i)

    def normal(*shape: int, scale: float) -> Tensor:
        new = torch.empty(*shape, dtype=spec.dtype, device=spec.device)
        for part in new:  # float32 copies of one expert at a time
            part.copy_(torch.randn(part.shape, generator=g, device=spec.device) * scale)
        return new

    biases = tuple(normal(e, n, scale=0.5) for n in (packed, h)) if spec.bias else ()
    return Weights(normal(e, packed, h, scale=h**-0.5), normal(e, h, i, scale=i**-0.5), biases)


def load_experts(kernel: ExpertKernel, weights: Weights) -> None:
    """Load every expert of ``weights`` into ``kernel``."""
    for e in range(kernel.spec.num_experts):
        kernel.load_expert(e, weights.gate_up[e], weights.down[e], *(b[e] for b in weights.biases))


def random_input(
    spec: ExpertSpec, tokens: int, top_k: int, of: int, g: torch.Generator, *, skewed: bool = False
) -> ExpertInput:
    """Draw one step's tokens [T, H] and slots [T, k], -1 for an expert that is not in ``spec``.

    ``of``: experts of the model, of which ``spec`` holds the first. ``g``: a generator on the device of
    ``spec``. ``skewed``: one expert gets most tokens, one gets none, and one slot in ten is dropped.
    """
    scores = torch.rand(tokens, of, generator=g, device=spec.device)
    if skewed and of > top_k:
        scores[:, 0] += 0.8
        scores[:, spec.num_experts - 1] -= 2.0
    ids = scores.topk(top_k).indices.to(torch.int32)
    ids = ids.masked_fill(ids >= spec.num_experts, -1)
    if skewed:
        ids = ids.masked_fill(torch.rand(ids.shape, generator=g, device=spec.device) < 0.1, -1)
    hidden = torch.randn(tokens, spec.hidden_size, generator=g, device=spec.device).to(spec.dtype)
    weights = torch.rand(tokens, top_k, generator=g, device=spec.device)
    return ExpertInput(hidden, ids, weights / weights.sum(1, keepdim=True))


def random_inputs(spec: ExpertSpec, layer: LayerCase, tokens: int, g: torch.Generator) -> list[ExpertInput]:
    """Draw inputs to time in turn: few tokens read some experts, the next must read others."""
    copies = 8 if tokens <= 64 else 4 if tokens <= 1024 else 2
    return [random_input(spec, tokens, layer.top_k, layer.of, g) for _ in range(copies)]


def require_gpu(spec: ExpertSpec) -> None:
    """Raise AgreedError, shown as one line, if the Triton kernels cannot run here."""
    reason = why_unavailable(spec)
    if reason:
        raise AgreedError(f"the GPU kernels cannot run here: {reason}")
