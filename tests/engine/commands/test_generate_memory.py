"""A run's first lines say how much memory it takes, within a twentieth, whatever the batch."""

import random
import re
import sys
from pathlib import Path

import pytest
from launch import mpirun

from xpar.engine import cli

TOKENS, PROMPTS = 1500, 24
"""Keys, values and the numbers of a step take hundreds of MB, the weights little."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    sizes = ["--layers", "2", "--experts", "16", "--hidden", "512", "--intermediate", "512", "--top-k", "8"]
    assert cli.main(["make-checkpoint", "olmoe", str(folder / "model"), *sizes, "--vocab", "258"]) == 0
    draw = random.Random(0)
    texts = ("".join(draw.choices("abcdefgh ", k=TOKENS)) for _ in range(PROMPTS))
    (folder / "prompts.txt").write_text("".join(f"{text}\n" for text in texts))
    return folder


@pytest.mark.parametrize(("batch", "tokens"), [(2, 512), (64, 4096), (64, 16384)])
def test_the_first_lines_say_the_peak(folder: Path, batch: int, tokens: int) -> None:
    words = ["generate", str(folder / "model"), "--prompts", str(folder / "prompts.txt")]
    sizes = ["--batch", str(batch), "--prefill-tokens", str(tokens), "--max-new-tokens", "3"]
    out = ["--out", str(folder / f"{batch}-{tokens}.jsonl")]
    job = mpirun(1, [sys.executable, "-m", "xpar.engine", *words, *sizes, *out], timeout=300)
    assert job.returncode == 0, job.stderr
    said, peak = (
        int(re.findall(pattern, job.stdout)[0])
        for pattern in (r"at most about (\d+) MB of memory on rank 0", r"peak memory a rank: \d+ to (\d+) MB")
    )
    assert abs(said - peak) < 0.05 * peak
