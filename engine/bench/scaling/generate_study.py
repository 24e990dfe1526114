"""A whole model as the subject of a sweep: the prompts of a file, answered on more and more ranks."""

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
from xpar.engine.console.report import manifest
from xpar.engine.generation.generate import generate
from xpar.engine.generation.request import Request, Workload
from xpar.engine.generation.run_file import RunSummary
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.loader import LoadedModel, load_model
from xpar.engine.models.parallelize import SpreadOptions

MOST_ROUNDS = 5


class AnswerCheck:
    """Answers beside those that were given first to the same prompts. On rank 0 of the job.

    ``exact``: they must be the same; otherwise other ranks round otherwise, and a text may take another turn.
    """

    def __init__(self, exact: bool) -> None:
        self.exact = exact
        self.first: dict[str, str] = {}

    def judge(self, answers: Mapping[str, str]) -> dict[str, Any]:
        """``answers_same`` of ``answers_compared``; ``correct``: every prompt has an answer, in exact mode the same."""
        same = sum(self.first.setdefault(key, text) == text for key, text in answers.items())
        correct = same == len(answers) or not self.exact
        return {"answers_same": same, "answers_compared": len(answers), "correct": correct}


@dataclass(frozen=True)
class GenerateStudy:
    """``work``: every prompt of the file; a weak point of n ranks answers the first n parts of ``largest``.

    ``request.out``: a folder for the answers. ``seconds``: rounds are repeated so long, up to 5.
    """

    axes: Axes
    request: Request
    work: Workload
    tokens: Tokenizer
    options: SpreadOptions
    largest: int
    seconds: float
    check: AnswerCheck

    def __call__(self, world: World) -> "GenerateStudyStep":
        grid = self.axes.grid(world)
        try:
            loaded = load_model(self.request.checkpoint, grid, self.request.dtype, self.options)
        except AgreedError:
            grid.close()
            raise
        return GenerateStudyStep(self, grid, loaded)

    def prompts(self, mode: str, ranks: int) -> int:
        """How many of the file's prompts a point answers."""
        every = len(self.work.queue)
        return every if mode == "strong" else every // self.largest * ranks


class GenerateStudyStep:
    """See :class:`~xpar.engine.bench.scaling.study.StudyStep`."""

    def __init__(self, study: GenerateStudy, grid: ProcessGrid, loaded: LoadedModel) -> None:
        self.study, self.grid, self.loaded = study, grid, loaded
        self._seen: dict[int, dict[str, Any]] = {}
        self._answer(min(grid.world.size * study.request.batch, len(study.work.queue)))  # warms up

    def measure(self, mode: str) -> dict[str, Any]:
        """Where both modes have the same prompts, they are answered once."""
        prompts = self.study.prompts(mode, self.grid.world.size)
        if prompts not in self._seen:
            self._seen[prompts] = self._measured(prompts)
        return self._seen[prompts]

    def _measured(self, prompts: int) -> dict[str, Any]:
        s, comm = self.study, self.grid.world.comm
        rounds: list[RunSummary] = []
        before = self.loaded.slots()
        while not rounds or (len(rounds) < MOST_ROUNDS and sum(r.seconds for r in rounds) < s.seconds):
            # Rank 0's clock decides for all whether another round follows.
            rounds.append(comm.all_gather_object(self._answer(prompts))[0])
        slots = comm.all_gather_object(self.loaded.slots() - before)
        seconds = [r.seconds for r in rounds]
        middle, tokens = statistics.median(seconds), rounds[-1].tokens
        verdict = s.check.judge(_texts(self._file(prompts))) if comm.rank == 0 else {}
        return {
            "prompts": prompts,
            "tokens": tokens,
            "steps": len(rounds),
            "ms": {"median": middle * 1e3, "min": min(seconds) * 1e3, "max": max(seconds) * 1e3},
            "tokens_per_s": tokens / middle,
            "imbalance": max(slots) * len(slots) / max(1, sum(slots)),
            "threads": torch.get_num_threads(),
            **verdict,
        }

    def manifest(self) -> dict[str, Any]:
        layer = self.loaded.layers[0].runner
        kernel = str(layer.kernel.name if layer.kernel else None)
        s = self.study.request
        return manifest(self.grid, s.dtype, layer.dispatcher.name, kernel, s.sampling.seed)

    def close(self) -> None:
        self.grid.close()

    def _answer(self, prompts: int) -> RunSummary:
        """Answer the first ``prompts`` prompts of the file."""
        s, comm, out = self.study, self.grid.world.comm, self._file(prompts)
        agreed(comm, lambda: out.unlink(missing_ok=True) if comm.rank == 0 else None)
        queue = tuple(q for q in s.work.queue if s.work.order[q.hash] < prompts)
        return generate(
            comm, replace(s.request, out=out), replace(s.work, queue=queue), s.tokens, self.loaded
        )

    def _file(self, prompts: int) -> Path:
        return self.study.request.out / f"{prompts}-prompts-{self.grid.world.size}-ranks.jsonl"


def _texts(path: Path) -> dict[str, str]:
    """Prompt's hash -> answer."""
    records: Sequence[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
    return {r["hash"]: r["text"] for r in records}
