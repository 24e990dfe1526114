"""No warning of transformers reaches a user's screen: it is called as its newest version wants."""

import logging
import warnings
from pathlib import Path

import pytest
import torch
from moe_families import ONE_PER_FAMILY, Case
from tiny_models import SIZES, write_tokenizer

from xpar.comm import ProcessGrid
from xpar.engine.generation.decode_batch import DecodeBatch
from xpar.engine.generation.generation_defaults import read_defaults
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.score_batch import ScoreBatch, ScoredText
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.loader import load_model

CASES = [
    case for case in ONE_PER_FAMILY if case.model_type in ("mixtral", "gpt_oss", "phimoe", "dbrx", "jetmoe")
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.model_type)
def test_a_model_answers_and_scores_without_warnings(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.write(tmp_path, "transformers", torch.float32, 1, **SIZES)
    write_tokenizer(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "transformers"):
        warnings.simplefilter("error", FutureWarning)
        warnings.filterwarnings("error", category=DeprecationWarning, module="transformers|xpar")
        read_defaults(tmp_path)
        Tokenizer(tmp_path)
        loaded = load_model(tmp_path, ProcessGrid.single())
        decoding = DecodeBatch(loaded, Sampling(), StopConditions(3))
        decoding.begin([RunningSequence(n, [1, 2, 3 + n], torch.Generator()) for n in range(2)])
        while decoding.occupied:
            decoding.advance()
        scoring = ScoreBatch(loaded, 1, 3)
        scoring.begin([ScoredText(0, [1, 2, 3, 4, 5, 6], 1)])
        while scoring.occupied:
            scoring.advance()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
