"""The scaling study of a whole model that answers the prompts of a file."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from xpar.comm.failure import AgreedError, agreed
from xpar.comm.grid import ProcessGrid
from xpar.comm.world import World
from xpar.engine.bench.scaling.layer_study import Axes
from xpar.engine.console.manifest import grid_manifest
from xpar.engine.generation.answer_file import errors_path
from xpar.engine.generation.generate import generate
from xpar.engine.generation.request import Request, Workload
from xpar.engine.generation.run_file import RunSummary
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.layer.expert_load import imbalance
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.loader import load_model
from xpar.engine.models.parallelize import SpreadOptions

MOST_ROUNDS = 5


class AnswerCheck:
    """The check of answers on rank 0: each must equal the first answer to its prompt.

    ``exact``: answers must be the same. Otherwise another number of ranks rounds in another way, and a text
    may differ.
    """

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.first: dict[str, str] = {}

    def judge(self, answers: Mapping[str, str]) -> dict[str, Any]:
        """Compare ``answers`` by hash: ``answers_same`` of ``answers_compared``, ``correct``."""
        same = sum(self.first.setdefault(key, text) == text for key, text in answers.items())
        correct = same == len(answers) or not self.exact
        return {"answers_same": same, "answers_compared": len(answers), "correct": correct}


@dataclass(frozen=True)
class GenerateStudy:
    """The study of a whole model; calling it loads the model on the ranks of one point.

    Attributes:
        axes: the arrangement of the ranks.
        request: the request of ``xpar generate``, whose ``out`` is a folder for the answers.
        work: every prompt of the file. In the weak mode a point of n ranks answers the first n of ``largest``
            parts.
        largest: number of ranks of the largest point.
        seconds: rounds are repeated for so long, up to 5.
    """

    axes: Axes
    request: Request
    work: Workload
    tokenizer: Tokenizer
    options: SpreadOptions
    largest: int
    seconds: float
    check: AnswerCheck

    def __call__(self, world: World) -> "GenerateStudyStep":
        grid = self.axes.make_grid(world)
        try:
            loaded = load_model(self.request.checkpoint, grid, self.request.dtype, self.options)
        except AgreedError:
            grid.close()
            raise
        return GenerateStudyStep(self, grid, loaded)

    def count_prompts(self, mode: str, ranks: int) -> int:
        """Return how many of the file's prompts a point of ``ranks`` ranks answers."""
        total = len(self.work.queue)
        return total if mode == "strong" else total // self.largest * ranks


class GenerateStudyStep:
    """Implements :class:`~xpar.engine.bench.scaling.study.StudyStep` for a whole model."""

    def __init__(self, study: GenerateStudy, grid: ProcessGrid, loaded: LoadedModel) -> None:
        self.study, self.grid, self.loaded = study, grid, loaded
        self._measured: dict[int, dict[str, Any]] = {}
        self._answer(min(grid.world.size * (study.request.batch or 1), len(study.work.queue)))  # warms up

    def measure(self, mode: str) -> dict[str, Any]:
        """Measure one mode; if both modes have the same prompts, they are answered once. Collective."""
        prompts = self.study.count_prompts(mode, self.grid.world.size)
        if prompts not in self._measured:
            self._measured[prompts] = self._measure_prompts(prompts)
        return self._measured[prompts]

    def _measure_prompts(self, prompts: int) -> dict[str, Any]:
        s, comm = self.study, self.grid.world.comm
        rounds: list[RunSummary] = []
        before = self.loaded.slots()
        while not rounds or (len(rounds) < MOST_ROUNDS and sum(r.seconds for r in rounds) < s.seconds):
            # Rank 0's clock decides for all whether another round follows.
            rounds.append(comm.all_gather_object(self._answer(prompts))[0])
        slots = comm.all_gather_object(self.loaded.slots() - before)
        seconds = [r.seconds for r in rounds]
        median, tokens = statistics.median(seconds), rounds[-1].tokens
        verdict = s.check.judge(_read_answers(self._answer_file(prompts))) if comm.rank == 0 else {}
        return {
            "prompts": prompts,
            "tokens": tokens,
            "steps": len(rounds),
            "ms": {"median": median * 1e3, "min": min(seconds) * 1e3, "max": max(seconds) * 1e3},
            "tokens_per_s": tokens / median,
            "imbalance": imbalance(slots),
            "threads": torch.get_num_threads(),
            **verdict,
        }

    def manifest(self) -> dict[str, Any]:
        """Describe the point for the JSON document."""
        runner, request = self.loaded.layers[0].runner, self.study.request
        return grid_manifest(
            self.grid,
            request.dtype,
            runner.dispatcher.name,
            runner.experts.kernel_name,
            request.sampling.seed,
        )

    def close(self) -> None:
        """Free the groups of the grid; collective."""
        self.grid.close()

    def _answer(self, prompts: int) -> RunSummary:
        """Answer the first ``prompts`` prompts of the file; collective."""
        s, comm, out = self.study, self.grid.world.comm, self._answer_file(prompts)
        agreed(comm, lambda: _remove_answers(out) if comm.rank == 0 else None)
        queue = tuple(q for q in s.work.queue if s.work.order[q.hash] < prompts)
        return generate(
            comm, replace(s.request, out=out), replace(s.work, queue=queue), s.tokenizer, self.loaded
        )

    def _answer_file(self, prompts: int) -> Path:
        return self.study.request.out / f"{prompts}-prompts-{self.grid.world.size}-ranks.jsonl"


def _remove_answers(out: Path) -> None:
    """Remove a file of answers, and the file of its errors."""
    for path in (out, errors_path(out)):
        path.unlink(missing_ok=True)


def _read_answers(path: Path) -> dict[str, str]:
    """Read a file of answers: the hash of each prompt -> its answer."""
    results: Sequence[dict[str, Any]] = [json.loads(line) for line in path.read_bytes().splitlines()]
    return {r["hash"]: r["text"] for r in results}
