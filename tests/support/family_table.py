"""Write docs/families.md from the installed transformers: ``python tests/support/family_table.py``."""

import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from quantised_files import write_floats
from shrunk_families import NOT_RUN, VALUES, WITHOUT_INTERFACE, classes, families, small_model

from xpar.comm import AgreedError, ProcessGrid, World
from xpar.engine.architectures import ARCHITECTURES
from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.formats.quantised_on_load import Quantisation
from xpar.engine.models.empty_model import build_empty_model
from xpar.engine.models.expert_layer import experts_modules
from xpar.engine.models.expert_sources import stored_names
from xpar.engine.models.experts_module import module_names
from xpar.engine.models.loader import load_model
from xpar.engine.models.parallelize import SpreadOptions
from xpar.engine.models.quantise_checkpoint import quantise_checkpoint
from xpar.engine.models.weight_sources import find_sources

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"
HEAD = """# Families

Every family of transformers {version} with routed experts, as a whole model (`xpar generate`, `xpar
score`). This page is made by `python tests/support/family_table.py`;
`tests/engine/models/test_every_family_mpi.py` walks over the same families and compares logits, greedy text
of prompts of three lengths, and the bytes that ranks read, on one and two ranks, in float32, with
transformers; in exact mode two ranks give the bits of one. A family of a newer transformers needs nothing of
xpar if the walk passes. The walk passes with transformers 5.17, too, of which 56 families are in it.

- *experts*: how they are stored, and so read. *One by one* and *stacked*: each rank reads its own, by name
  or by rows. *Whole layers*: transformers' conversion mixes experts, so that each rank reads one layer at a
  time and cuts it. *By a schema*: transformers does not let others compute these experts, and xpar replaces
  the whole block.
- *whole block*: whether xpar also has the router and the shared experts (`xpar run`, `--whole-block`);
  otherwise it computes the experts alone, and the model's own code routes.
- *state*: what the model keeps of the tokens that it has read. Prompts of models that keep more than keys and
  values are read in groups of equal length, since padding would become a part of such a state; sequences
  whose states are recurrent or convolutional, beside keys and values, are continued together.
- *quantised*: which quantised weights serve it. *Every form*: checkpoints in any form of
  [quantisation](quantisation.md); found out with one in int8 and one in fp8, whose logits are those of
  transformers with the weights in floats. *At load*: `--quantize` alone, because its experts are stacked in
  one tensor, for which no such form is published.

| family | classes | experts | quantised | whole block | state | in the walk |
|---|---|---|---|---|---|---|
"""
STATES = {
    "DynamicLayer": "keys and values",
    "DynamicSlidingWindowLayer": "window",
    "LinearAttentionLayer": "recurrent or convolutional",
    "LinearAttentionAndFullAttentionLayer": "keys and values, convolutional",
    "LinearAttentionAndSlidingWindowAttentionLayer": "window, convolutional",
    "DynamicIndexedLayer": "keys, values and index",
    "DummyLayer": "layers without any",
}
"""transformers' cache classes in words; others keep their name."""
OWN_FORMS = {"gpt_oss": "MXFP4; "}
"""Published forms of stacked experts, tested in ``tests/engine/models/test_quantised_models_mpi.py``."""


def rows() -> Iterator[str]:
    """Yield a line of the table for each family."""
    for family in families():
        models = list(classes(family)) if family not in NOT_RUN else []
        types = types_of(family)
        experts = states = formats = "-"
        if models:
            experts, states = describe(*models[-1])
            formats = find_formats(*models[-1])
        if family in WITHOUT_INTERFACE and experts == "-" and family not in NOT_RUN:
            experts = "by a schema"
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(name for _, name in models)) or "-"
        own = ", with values of its own" if any(name in VALUES for name in types) else ""
        walk = NOT_RUN.get(family, f"yes{own}")
        yield f"| {family} | {names} | {experts} | {formats} | {whole_block(family)} | {states} | {walk} |"


def types_of(family: str) -> list[str]:
    """Return the values of ``model_type`` that the classes of a family have, if it is installed."""
    models = classes(family) if family not in NOT_RUN else ()
    return list(dict.fromkeys([family, *(model_type for model_type, _ in models)]))


def whole_block(family: str) -> str:
    """Say whether xpar has the whole block of a family: ``yes``, ``layers only`` or ``no``."""
    schemas = {arch.model_type: arch.why_layers_only is None for arch in ARCHITECTURES}
    known = [schemas[name] for name in types_of(family) if name in schemas]
    return "yes" if any(known) else "layers only" if known else "no"


def describe(model_type: str, name: str) -> tuple[str, str]:
    """Say how the experts of a class are stored, and what its cache holds."""
    from transformers.cache_utils import DynamicCache

    with tempfile.TemporaryDirectory() as folder:
        small: Any = small_model(model_type, name, seed=1)
        small.save_pretrained(folder)
        with Checkpoint(folder) as checkpoint:
            model = build_empty_model(checkpoint, torch.float32)
            states = dict.fromkeys(type(x).__name__ for x in DynamicCache(config=model.config).layers)
            return stored(model, checkpoint), "; ".join(STATES.get(s, f"`{s}`") for s in states)


def find_formats(model_type: str, name: str) -> str:
    """Say which quantised weights a class takes, by comparing logits; raise AssertionError if they differ."""
    grid = ProcessGrid.create(World.attach(MPI.COMM_SELF))
    with tempfile.TemporaryDirectory() as folder:
        floats = Path(folder) / "floats"
        small: Any = small_model(model_type, name, seed=1)
        small.save_pretrained(floats)
        written = [form for form in ("int8", "fp8") if is_quantised_right(type(small), floats, form, grid)]
        if written:
            return "every form" if len(written) == 2 else ", ".join(written)
        own = OWN_FORMS.get(model_type, "")
        try:
            load_model(floats, grid, options=SpreadOptions(quantisation=Quantisation("int8", None)))
        except AgreedError:
            return f"{own}no"
        return f"{own}at load"


def is_quantised_right(kind: Any, floats: Path, form: str, grid: ProcessGrid) -> bool:
    """Return whether the checkpoint ``floats`` can be written in ``form``; assert that it is read right."""
    quantised, beside = floats.with_name(form), floats.with_name(f"{form} in floats")
    try:
        quantise_checkpoint(floats, quantised, Quantisation(form, form))
    except ValueError:
        return False
    write_floats(quantised, beside)
    ids = torch.arange(3, 16)[None]
    with torch.inference_mode():
        expected = kind.from_pretrained(beside).eval()(ids, use_cache=False).logits
        loaded = load_model(quantised, grid, torch.float32, SpreadOptions(dense="plain"))
        found = loaded.model(ids, use_cache=False).logits
    assert (found - expected).norm() < 1e-5 * expected.norm(), (kind, form)
    return True


def stored(model: Any, checkpoint: Checkpoint) -> str:
    """Say how the first experts module of ``model`` is stored."""
    modules = experts_modules(model)
    if not modules:
        return "by a schema"
    name = next(iter(modules.values()))
    module, sources = model.get_submodule(name), find_sources(model, checkpoint)
    own = dict(module.named_parameters(recurse=False))
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    wanted = {key: sources[f"{name}.{key}"] for key in own}
    found = stored_names(module_names(module), wanted, shapes, checkpoint)
    return "whole layers" if found is None else {"single": "one by one"}.get(found.storage, found.storage)


def main() -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    PAGE.write_text(HEAD.format(version=version("transformers")) + "\n".join(rows()) + "\n")


if __name__ == "__main__":
    main()
