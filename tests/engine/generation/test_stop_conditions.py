"""The end of an answer: a limit, an end token, a stop text."""

import pytest
import torch

from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.tokenizer import first_stop


def test_an_answer_ends_at_the_first_condition_that_holds() -> None:
    def run(limits: StopConditions, tokens: list[int]) -> tuple[list[int], str | None]:
        running = RunningSequence(0, [1], torch.Generator())
        for token in tokens:
            if running.finish is None:
                limits.take(running, token)
        return running.answer, running.finish

    limits = StopConditions(3, frozenset({9}), lambda answer: list(answer[-2:]) == [4, 5])
    assert run(limits, [1, 2, 3, 4]) == ([1, 2, 3], "length")
    assert run(limits, [1, 9, 3]) == ([1], "end")
    assert run(limits, [4, 5, 6]) == ([4, 5], "stop")
    assert run(limits, [1, 2]) == ([1, 2], None)


@pytest.mark.parametrize(("text", "place"), [("abcabd", 2), ("xx", None), ("", None), ("dca", 0)])
def test_the_first_stop_text_is_found_at_its_first_place(text: str, place: int | None) -> None:
    assert first_stop(text, ("ca", "dc")) == place
