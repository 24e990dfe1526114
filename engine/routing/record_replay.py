"""Recorded routing: the ids and weights of many steps and layers in one file, and a rule that replays them.

The file is safetensors. For each layer l it holds ``layer.l.topk_ids`` [N, k] int32 and
``layer.l.topk_weights`` [N, k] float32, the tokens of all steps end to end, and ``layer.l.tokens`` [steps]
int64, the number of tokens of each step. A layer with identity experts has ``layer.l.identity_weights`` [N]
float32 too. The metadata are ``format`` and ``weight_on_input``, a list of layers.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from xpar.engine.routing.rule import token_rows
from xpar.kernels.contracts import Routing

FORMAT = "xpar-routing-1"
REQUIRED = ("topk_ids", "topk_weights", "tokens")


class RoutingRecorder:
    """Keeps the routing of every call of :meth:`record` in host memory until :meth:`save` writes them."""

    def __init__(self) -> None:
        self._steps: dict[int, list[Routing]] = {}

    def record(self, layer: int, routing: Routing) -> None:
        """Append one step of layer ``layer``; a step may have any number of tokens, 0 too."""
        steps = self._steps.setdefault(layer, [])
        k = routing.topk_ids.shape[1]
        if steps and (steps[0].topk_ids.shape[1] != k or _kind(steps[0]) != _kind(routing)):
            raise ValueError(
                f"layer {layer}, step {len(steps)}: routing of another kind or top_k than step 0"
            )
        steps.append(
            Routing(
                _copy(routing.topk_ids, torch.int32),
                _copy(routing.topk_weights, torch.float32),
                routing.weight_on_input,
                None if routing.identity_weights is None else _copy(routing.identity_weights, torch.float32),
            )
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that was recorded; ``path`` is replaced only by a complete file."""
        tensors = {
            name: t for layer, steps in self._steps.items() for name, t in _tensors(layer, steps).items()
        }
        on_input = sorted(layer for layer, steps in self._steps.items() if steps[0].weight_on_input)
        metadata = {"format": FORMAT, "weight_on_input": " ".join(map(str, on_input))}
        target = Path(path)
        unfinished = target.with_name(target.name + ".part")
        save_file(tensors, unfinished, metadata)
        unfinished.replace(target)


class ReplayRule:
    """A rule that answers call n with step n of a recorded layer; ``repeat``: over and over."""

    def __init__(self, path: str | os.PathLike[str], layer: int, *, repeat: bool = False) -> None:
        self.steps = read_routing(path, layer)
        self.layer, self.repeat = layer, repeat
        self._next = 0

    def route(
        self,
        hidden_states: Tensor | None,
        router_logits: Tensor | None = None,
        input_ids: Tensor | None = None,
    ) -> Routing:
        """Return the next recorded step; ValueError if its tokens are not as many, or none is left."""
        given = token_rows(hidden_states, router_logits, input_ids)
        if self._next == len(self.steps) and self.repeat:
            self._next = 0
        if self._next == len(self.steps):
            raise ValueError(
                f"layer {self.layer}: all {len(self.steps)} recorded steps have been replayed; record more, "
                "or repeat"
            )
        routing = self.steps[self._next]
        if given.shape[0] != routing.topk_ids.shape[0]:
            raise ValueError(
                f"layer {self.layer}, step {self._next}: recorded with {routing.topk_ids.shape[0]} tokens, "
                "called with "
                f"{given.shape[0]}"
            )
        self._next += 1
        return _to(routing, given.device)


def read_routing(path: str | os.PathLike[str], layer: int) -> Sequence[Routing]:
    """Read the recorded steps of ``layer``; ValueError if ``path`` is no recording or lacks the layer."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            prefix = f"layer.{layer}."
            if metadata.get("format") != FORMAT:
                raise ValueError(
                    f"{path}: not a recorded routing (format {metadata.get('format')!r}, not {FORMAT!r})"
                )
            if not all(prefix + name in names for name in REQUIRED):
                layers = sorted({int(name.split(".")[1]) for name in names})
                raise ValueError(f"{path}: layer {layer} was not recorded; recorded layers: {layers}")
            found = {
                name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)
            }
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read as safetensors ({error}); record it again") from None
    on_input = str(layer) in metadata.get("weight_on_input", "").split()
    return _split(found, on_input, f"{path}: layer {layer}")


def _split(found: dict[str, Tensor], on_input: bool, where: str) -> list[Routing]:
    sizes = found["tokens"].tolist()
    if any(t.shape[0] != sum(sizes) for name, t in found.items() if name != "tokens"):
        raise ValueError(
            f"{where}: its tensors do not hold the {sum(sizes)} tokens of its steps; record it again"
        )
    ids, weights = torch.split(found["topk_ids"], sizes), torch.split(found["topk_weights"], sizes)
    identity = (
        torch.split(found["identity_weights"], sizes) if "identity_weights" in found else [None] * len(sizes)
    )
    return [Routing(i, w, on_input, z) for i, w, z in zip(ids, weights, identity, strict=True)]


def _tensors(layer: int, steps: Sequence[Routing]) -> dict[str, Tensor]:
    tensors = {
        f"layer.{layer}.topk_ids": torch.cat([s.topk_ids for s in steps]),
        f"layer.{layer}.topk_weights": torch.cat([s.topk_weights for s in steps]),
        f"layer.{layer}.tokens": torch.tensor([s.topk_ids.shape[0] for s in steps]),
    }
    identity = [s.identity_weights for s in steps if s.identity_weights is not None]
    return tensors | ({f"layer.{layer}.identity_weights": torch.cat(identity)} if identity else {})


def _kind(routing: Routing) -> tuple[bool, bool]:
    return routing.weight_on_input, routing.identity_weights is None


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype, copy=True)


def _to(routing: Routing, device: torch.device) -> Routing:
    identity = routing.identity_weights
    return Routing(
        routing.topk_ids.to(device, copy=True),
        routing.topk_weights.to(device, copy=True),
        routing.weight_on_input,
        None if identity is None else identity.to(device, copy=True),
    )
