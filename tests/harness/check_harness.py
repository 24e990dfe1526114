"""Run by hand where lm-eval is installed: xpar's answers to the harness are those of its own backend for
transformers.

    pip install 'xpar[eval]' accelerate
    mpirun -n 2 python -m mpi4py tests/harness/check_harness.py

Loglikelihoods with and without context, texts longer than the model, answers with stop texts; then the
command itself on a task of this folder. Opens no connection. Prints what it compared; a difference ends it
with an error.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import torch
from moe_families import Case
from tiny_models import prompts, write_model

from xpar.comm import ProcessGrid, World, run
from xpar.engine.cli import main as xpar
from xpar.engine.generation.service import Service
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.loader import load_model

TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


def main() -> None:
    world = World.attach()
    folder = Path(world.comm.all_gather_object(tempfile.mkdtemp())[0])
    if world.rank == 0:
        case = Case("olmoe", "olmoe", {"max_position_embeddings": 64})
        write_model(case, folder / "model", torch.float32, 1)
    world.comm.barrier()
    service = Service(
        world.comm,
        load_model(folder / "model", ProcessGrid.create(world)),
        Tokenizer(folder / "model"),
        3,
        40,
    )
    if world.rank:
        service.serve()
    else:
        compare(service, folder / "model")
        service.end()
    command(world, folder)


def compare(service: Service, path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from xpar.engine.generation.lm_eval import model_class

    def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
        return [Instance(kind, {}, a, n) for n, a in enumerate(arguments)]

    ours = model_class()(service, str(path))
    theirs = HFLM(pretrained=str(path), device="cpu", dtype="float32", batch_size=1, max_length=64)
    texts = prompts(3, 12, 30)
    pairs = [(a, f" {b}") for a, b in zip(texts[:6], texts[6:], strict=True)]
    pairs += [("", "abc"), ("ends in spaces  ", "b"), ("x" * 80, "yz")]
    asked = instances("loglikelihood", pairs)
    check("loglikelihood", ours.loglikelihood(asked), theirs.loglikelihood(asked))
    asked = instances("loglikelihood_rolling", [(text,) for text in (*texts, "long " * 50)])
    check("rolling", ours.loglikelihood_rolling(asked), theirs.loglikelihood_rolling(asked))
    options = [
        {"until": ["q"], "max_gen_toks": 9},
        {"until": ["\n\n"], "max_gen_toks": 4, "do_sample": False},
    ]
    asked = instances("generate_until", [(text, options[n % 2]) for n, text in enumerate(texts)])
    check("generate_until", ours.generate_until(asked), theirs.generate_until(asked))


def check(what: str, ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs), what
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        pair = list(zip(a, b, strict=True)) if isinstance(a, tuple) else [(a, b)]
        for x, y in pair:
            close = abs(x - y) < 1e-3 if isinstance(x, float) else x == y
            assert close, f"{what} {number}: xpar {a!r}, transformers {b!r}"
    print(f"{what}: {len(ours)} answers agree")  # noqa: T201


def command(world: World, folder: Path) -> None:
    if world.rank == 0:
        lines = [{"question": text, "choices": ["a", "bc", " d"]} for text in prompts(4, 10)]
        (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "tiny.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    world.comm.barrier()
    words = ["--tasks", "tiny", "--include_path", str(folder), "--output_path", str(folder / "results")]
    assert xpar(["evaluate", str(folder / "model"), *words]) == 0
    if world.rank == 0:
        (result,) = (folder / "results").rglob("results*.json")
        assert 0 <= json.loads(result.read_text())["results"]["tiny"]["acc,none"] <= 1
        print("the command: agrees")  # noqa: T201


if __name__ == "__main__":
    run(main)
