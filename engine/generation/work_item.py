"""The unit of work on a file: one answer to one prompt, or one text to be scored."""

from dataclasses import dataclass

from xpar.engine.generation.answer_options import AnswerOptions
from xpar.engine.generation.prompts import Prompt


@dataclass(frozen=True)
class WorkItem:
    """A prompt as the model reads it; ``hash``, of its text, fields and key, names its answer.

    ``first``: of ``ids``, the first that is scored, where that is asked. ``options``: of its answer, where
    the line has some of its own. ``draws``: the name of its draws, where that is not the hash. ``sample``: of
    the ``samples`` that its answer has, the one that this is.
    """

    prompt: Prompt
    ids: list[int]
    hash: str
    first: int = 1
    options: AnswerOptions | None = None
    draws: str = ""
    sample: int = 0
    samples: int = 1

    @property
    def name_of_draws(self) -> str:
        """The name of this sample's draws; the first sample has those of a single one."""
        return (self.draws or self.hash) + (f":{self.sample}" if self.sample else "")
