"""The samples of prompts that have several (``n``), which wait in a file of their own until all are there.

A sample is on the disk once it is complete, as an answer is; a job that goes on draws only the missing ones.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xpar.engine.generation.work_item import WorkItem

Record = Mapping[str, Any]


def samples_path(out: Path) -> Path:
    """Return the path of samples that wait: ``answers.jsonl`` -> ``answers.samples.jsonl``."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.samples.jsonl")


def sample_record(question: WorkItem, choice: Mapping[str, Any], settings: str) -> dict[str, Any]:
    """Make the record of one sample of ``question``."""
    place = {"line": question.prompt.line, "sample": question.sample, "of": question.samples}
    return {**place, "choice": choice, "hash": question.hash, "settings": settings}


class Samples:
    """The samples of prompts that are not complete, by hash of the prompt and number of the sample."""

    def __init__(self, records: Iterable[Record] = ()) -> None:
        self._waiting: dict[str, dict[int, Record]] = defaultdict(dict)
        for record in records:
            self._waiting[record["hash"]][record["sample"]] = record

    def add(self, record: Record) -> list[Mapping[str, Any]] | None:
        """Add a sample; return the choices of its prompt in their order once all are there."""
        samples = self._waiting[record["hash"]]
        samples[record["sample"]] = record
        if len(samples) < record["of"]:
            return None
        del self._waiting[record["hash"]]
        return [samples[number]["choice"] for number in range(record["of"])]

    def done(self) -> set[tuple[str, int]]:
        """Return hash and number of every sample that waits."""
        return {(name, number) for name, samples in self._waiting.items() for number in samples}

    def records(self) -> list[Record]:
        """Return the records of all samples that wait."""
        return [record for samples in self._waiting.values() for record in samples.values()]
