"""The samples of prompts that have several (``n``), which wait in a file of their own until all are there.

A sample is on the disk once it is complete, as an answer is; a job that goes on draws only the missing ones.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from xpar.engine.generation.answer_form import Choice, Result
from xpar.engine.generation.work_item import WorkItem


def samples_path(out: Path) -> Path:
    """Return the path of samples that wait: ``answers.jsonl`` -> ``answers.samples.jsonl``."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.samples.jsonl")


def sample_result(item: WorkItem, choice: Choice, settings: str) -> Result:
    """Make the result of one sample of ``item``."""
    place = {"line": item.prompt.line, "sample": item.sample, "of": item.samples}
    return {**place, "choice": choice, "hash": item.hash, "settings": settings}


class Samples:
    """The samples of prompts that are not complete, by hash of the work item and number of the sample."""

    def __init__(self, results: Iterable[Result] = ()) -> None:
        self._waiting: dict[str, dict[int, Result]] = defaultdict(dict)
        for result in results:
            self._waiting[result["hash"]][result["sample"]] = result

    def add(self, result: Result) -> list[Choice] | None:
        """Add a sample; return the choices of its prompt in their order once all are there."""
        samples = self._waiting[result["hash"]]
        samples[result["sample"]] = result
        if len(samples) < result["of"]:
            return None
        del self._waiting[result["hash"]]
        return [samples[number]["choice"] for number in range(result["of"])]

    def done(self) -> set[tuple[str, int]]:
        """Return hash and number of every sample that waits."""
        return {(waiting, number) for waiting, samples in self._waiting.items() for number in samples}

    def results(self) -> list[Result]:
        """Return the results of all samples that wait."""
        return [result for samples in self._waiting.values() for result in samples.values()]
