"""The unit of work on a file: one answer to one prompt, or one text to be scored."""

from dataclasses import dataclass

from xpar.engine.generation.answer_options import AnswerOptions
from xpar.engine.generation.prompts import Prompt


@dataclass(frozen=True)
class WorkItem:
    """A prompt or text as the model reads it, in ``ids``.

    ``hash``: of all that decides its answer: text, fields and key. ``first``: of ``ids``, the first that is
    scored, where that is asked. ``options``: of its answer, where the line has some of its own.
    ``draws_hash``: what seeds its draws, where that is not ``hash``. ``sample``: of the ``samples`` that its
    answer has, the one that this is.
    """

    prompt: Prompt
    ids: list[int]
    hash: str
    first: int = 1
    options: AnswerOptions | None = None
    draws_hash: str = ""
    sample: int = 0
    samples: int = 1

    @property
    def seed_text(self) -> str:
        """The text that seeds this sample's draws; the first sample has those of a single one."""
        return (self.draws_hash or self.hash) + (f":{self.sample}" if self.sample else "")
