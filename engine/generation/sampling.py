"""The choice of the next token among logits; temperature, top-k and their like are transformers' own."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

NOT_FINITE = "the model's logits are not finite; check the checkpoint, or use another --dtype"
BANNED = "penalties and bans of the generation config leave no token to take"

CUTS = {
    "min_p": "MinPLogitsWarper",
    "typical_p": "TypicalLogitsWarper",
    "epsilon_cutoff": "EpsilonLogitsWarper",
    "eta_cutoff": "EtaLogitsWarper",
}
"""Transformers' classes that leave unlikely tokens out of a draw, behind top-k and top-p."""
DRAW_SETTINGS = ("top_h", *CUTS)


@dataclass(frozen=True)
class Sampling:
    """The way in which tokens are drawn.

    ``temperature`` 0 takes the likeliest token (the lowest id of equals).

    ``top_k``: draw among the k likeliest, 0 among all. ``top_p``: among the likeliest whose probabilities add
    up to p. ``seed``: of the draws; each prompt's depend on it and on the prompt alone, not on ranks or
    neighbours. ``settings``: further (name, value) of transformers' generation config, lists as tuples:
    further ways to leave unlikely tokens out of a draw, and those of
    :mod:`xpar.engine.generation.logits_processors`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise ValueError(f"top-k={self.top_k}: must be at least 1, or 0 for all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top-p={self.top_p}: must be above 0 and at most 1")
        if self.temperature == 0.0 and (self.top_k or self.top_p < 1.0):
            raise ValueError(
                "top-k and top-p choose among draws, and temperature 0 draws nothing; set temperature"
            )

    def generator(self, seed_text: str) -> torch.Generator:
        """Make the generator of one prompt's draws, from the seed and ``seed_text``."""
        digest = hashlib.sha256(f"{self.seed}:{seed_text}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def choose(self, logits: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """Choose one token of each row of ``logits`` [B, V] by its generator; ValueError if not finite."""
        if self.temperature == 0.0:
            tokens = _likeliest(logits).tolist()
            if -1 in tokens:
                raise ValueError(NOT_FINITE)
            return list(tokens)
        logits = logits.float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(NOT_FINITE)
        return self.choose_banned(logits, generators)

    def choose_banned(self, logits: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """Choose by host ``logits`` [B, V] float32 with bans as -inf; ValueError if a row has none left."""
        largest = logits.amax(dim=-1)
        if bool(
            (largest.isnan() | (largest == -torch.inf) | (largest.isinf() & (self.temperature > 0))).any()
        ):
            raise ValueError(
                f"{BANNED}; take some of the generation config back, as with --set suppress_tokens=null"
            )
        if self.temperature == 0.0:
            return [int(token) for token in logits.argmax(dim=-1)]
        probabilities = self._warped(logits).softmax(dim=-1)
        return [
            int(torch.multinomial(row, 1, generator=generator))
            for row, generator in zip(probabilities, generators, strict=True)
        ]

    def _warped(self, logits: Tensor) -> Tensor:
        for warper in self.warpers():
            logits = warper(None, logits)
        return logits

    def warpers(self) -> list[Any]:
        """Make transformers' warpers of a draw, in its order; ValueError for a wrong value."""
        import transformers

        warpers: list[Any] = [partial(_temper, transformers.TemperatureLogitsWarper(self.temperature))]
        settings = dict(self.settings)
        if "top_h" in settings:
            warpers.append(transformers.TopHLogitsWarper(settings["top_h"]))
        if self.top_k:
            warpers.append(transformers.TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            warpers.append(transformers.TopPLogitsWarper(self.top_p))
        return warpers + [
            getattr(transformers, kind)(settings[n]) for n, kind in CUTS.items() if n in settings
        ]


def _temper(warper: Any, ids: None, logits: Tensor) -> Tensor:
    """Divide logits by the temperature, as ``warper`` does, without an overflow at temperatures near 0."""
    warped: Tensor = warper(ids, logits)
    # Minus infinity is a banned token, or one that is too unlikely; only growth without bound is an overflow.
    over = (warped.isnan() | (warped == torch.inf)).any(dim=-1, keepdim=True)
    if not bool(over.any()):
        return warped
    # From logits whose largest is 0 the others become minus infinity, and the likeliest token is drawn.
    return torch.where(over, warper(ids, logits - logits.amax(dim=-1, keepdim=True)), warped)


def _likeliest(logits: Tensor) -> Tensor:
    """Find the lowest id of each row's largest logit, [B, V] -> [B] int64; -1 for a row that is not finite.

    On a GPU only these numbers cross to the host.
    """
    # One that is NaN makes both NaN. On a host processor these two are far faster than a test of all logits.
    least, largest = logits.amin(dim=-1, keepdim=True), logits.amax(dim=-1, keepdim=True)
    find = _first_on_gpu if logits.is_cuda else _first_on_host
    return find(logits == largest).where((least.isfinite() & largest.isfinite())[:, 0], -1)


def _first_on_host(found: Tensor) -> Tensor:
    """Find the first column of each row of ``found`` [B, V] bool that is true: [B] int64, 0 without one."""
    return torch.from_numpy(found.numpy().argmax(axis=-1))  # several times as fast as torch's of the logits


def _first_on_gpu(found: Tensor) -> Tensor:
    """Find the first column of each row as :func:`_first_on_host`, but V without one.

    On a GPU ``argmax`` takes any of equals.
    """
    ids = torch.arange(found.shape[1], device=found.device, dtype=torch.int32)
    return torch.where(found, ids, ids.new_full((), found.shape[1])).amin(dim=-1).long()
