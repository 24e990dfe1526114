"""Check that recorded steps give each row what transformers' ``generate`` gives it alone.

Needs one GPU, not part of the test run.

    python tests/gpu/check_rows.py

Small models of random weights in float32, for whose rows one number for a whole batch would be wrong:
longrope, dynamic scaling, which cannot be recorded, and Llama-4's attention temperature. xpar need not be
installed: the rooms are taken from this checkout.
"""

import copy
import random
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / ".typing"), str(ROOT / "tests" / "support")]

import torch
from row_models import ORIGINAL, OTHERS, ROPES, answer_alone, build
from torch import Tensor

from xpar.engine.generation.decode_batch import DecodeBatch
from xpar.engine.generation.decode_graph import record
from xpar.engine.generation.recorder import PATIENCE, DecodeGraph
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling

NAMES = ("qwen3_moe-longrope", "phimoe-longrope", "olmoe-dynamic", "llama4-temperature", "gpt_oss-window")
NEW = PATIENCE + 30
TOLERANCE = 1e-3
"""Of log-probabilities in float32; products of a GPU round otherwise than those of a host."""
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Remembering(Sampling):
    """Greedy, and keeps the logits of each sequence."""

    seen: dict[Any, list[Tensor]] = field(default_factory=dict)

    def choose(self, logits: Tensor, generators: Any) -> list[int]:
        for generator, row in zip(generators, logits, strict=True):
            self.seen.setdefault(generator, []).append(row.float().cpu())
        return super().choose(logits, generators)


def check(name: str, seed: int) -> None:
    """Four prompts on both sides of the length that the short factors are for.

    Those that grow past it on the way, too.
    """
    model = build({v.name: v for v in (*ROPES, *OTHERS)}[name], seed)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the others wait for the GPU
    draw, sampling = random.Random(seed), Remembering()
    on_gpu: Any = SimpleNamespace(
        model=copy.deepcopy(model).to(DEVICE),
        device=DEVICE,
        layers=(),
        slots=lambda: 0,
        is_cache_of_keys_and_values=True,
    )
    recorder = DecodeGraph(on_gpu, lambda step: record(step, [], DEVICE))
    sequences = DecodeBatch(on_gpu, sampling, StopConditions(NEW), recorder)
    lengths = (3, ORIGINAL - PATIENCE - 6, ORIGINAL, ORIGINAL + 9)
    rows = [
        RunningSequence(n, [draw.randrange(256) for _ in range(length)], torch.Generator())
        for n, length in enumerate(lengths)
    ]
    sequences.begin(list(rows))
    while sequences.running:
        sequences.advance()
    worst = 0.0
    for row in rows:
        alone = answer_alone(copy.deepcopy(model).to(DEVICE), row.ids, NEW)
        same = [a == b for a, b in zip(alone.answer, row.answer, strict=True)]
        until = NEW if all(same) else same.index(False) + 1
        mine = torch.stack(sampling.seen[row.generator])[:until].log_softmax(-1)
        worst = max(worst, float((mine - alone.logits[:until].cpu().log_softmax(-1)).abs().max()))
    print(f"{name}: off by {worst:.1e}, {recorder.replayed} steps replayed, refused: {recorder.refused}")  # noqa: T201
    if worst > TOLERANCE:
        raise SystemExit(f"{name}: more than {TOLERANCE}")


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    for number, each in enumerate(NAMES):
        check(each, number)
