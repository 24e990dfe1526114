"""When the inputs of experts are quantised, and the kernel that then computes them."""

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xpar.engine.commands.model_session import activations_of
from xpar.engine.config import WEIGHTS_ALONE, LayerConfig, RouterConfig, StoredActivations
from xpar.engine.layer.expert_shard import choose_for_weights, expert_spec
from xpar.engine.layer.input_scheme import choose_input_scheme
from xpar.engine.synthetic.checkpoint import make_checkpoint
from xpar.kernels.quantisation import NAMED_FORMATS
from xpar.kernels.quantised_weight import ActivationScheme
from xpar.kernels.row_format import RowFormat

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
BY_128 = StoredActivations(ActivationScheme())
OF_BATCH = StoredActivations(ActivationScheme(0), is_of_batch=True)
BF16, FP32 = torch.bfloat16, torch.float32


def layer(stored: StoredActivations, hidden: int = 256) -> LayerConfig:
    return LayerConfig(4, hidden, 128, RouterConfig(top_k=2), activations=stored)


CASES: dict[str, tuple[StoredActivations, tuple[Any, ...], bool, str]] = {
    "gpu": (
        BY_128,
        (GPU, BF16, "auto", False),
        True,
        "the checkpoint quantises inputs of experts, 272 bytes",
    ),
    "asked on a cpu": (BY_128, (CPU, BF16, "quantised", False), True, "asked for, 272 bytes in place of 512"),
    "asked in exact mode": (BY_128, (CPU, BF16, "quantised", True), True, "they were asked for"),
    "a scale a batch": (OF_BATCH, (GPU, BF16, "auto", False), True, "a scale for each token is finer"),
    "cpu": (BY_128, (CPU, BF16, "auto", False), False, "CPUs compute from quantised weights alone"),
    "exact mode": (BY_128, (GPU, BF16, "auto", True), False, "in exact mode no kernel on GPUs"),
    "float32": (BY_128, (GPU, FP32, "auto", False), False, "float32 was asked for"),
    "exact": (BY_128, (GPU, BF16, "exact", False), False, "exact activations were asked for"),
    "weights alone": (WEIGHTS_ALONE, (GPU, BF16, "auto", False), False, "quantises weights alone"),
    "a scale a batch, exact": (OF_BATCH, (GPU, BF16, "auto", True), False, "which exact mode rules out"),
}


@pytest.mark.parametrize("name", CASES)
def test_the_choice_and_its_reason(name: str) -> None:
    stored, arguments, is_quantised, reason = CASES[name]
    choice = choose_input_scheme(layer(stored), *arguments)
    assert reason in choice.explain()
    assert choice.scheme == (stored.scheme if is_quantised else None)
    assert choice.explain().startswith("rows travel as e4m3 with" if is_quantised else "rows travel as they")


def test_narrow_rows_travel_as_they_are() -> None:
    choice = choose_input_scheme(layer(BY_128, hidden=6), CPU, BF16, "quantised", False)
    assert (
        choice.row_format is None and choice.reason == "with its scales a row has 16 bytes, and 12 as it is"
    )


@pytest.mark.parametrize(
    ("stored", "exact", "why"),
    [
        (WEIGHTS_ALONE, False, "the checkpoint quantises weights alone; choose auto or exact"),
        (OF_BATCH, True, "one scale for all tokens of a batch, which exact mode rules out"),
    ],
    ids=["weights alone", "a scale a batch"],
)
def test_what_cannot_be_had_is_refused(stored: StoredActivations, exact: bool, why: str) -> None:
    with pytest.raises(ValueError, match=f"activations='quantised': .*{why}"):
        choose_input_scheme(layer(stored), CPU, BF16, "quantised", exact)
    with pytest.raises(ValueError, match="activations='all': choose one of auto, quantised, exact"):
        choose_input_scheme(layer(stored), CPU, BF16, "all", exact)  # type: ignore[arg-type]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that seems to have an H200."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("wanted", "exact", "takes_codes"),
    [("auto", False, True), ("exact", False, False), ("auto", True, False), ("quantised", True, False)],
)
def test_on_a_gpu_fp8_experts_stay_codes_whether_their_inputs_are_or_not(
    wanted: Any, exact: bool, takes_codes: bool
) -> None:
    config, fmt = layer(BY_128), NAMED_FORMATS["fp8"]
    inputs = choose_input_scheme(config, GPU, BF16, wanted, exact)
    spec, choice = choose_for_weights(
        expert_spec(config, GPU, 4, 128, BF16, exact, inputs.scheme), "auto", fmt
    )
    assert choice.name == "triton"
    assert spec.weight_format == fmt
    assert spec.activation_scheme == (BY_128.scheme if takes_codes else None)
    assert (inputs.row_format == RowFormat(256, ActivationScheme())) == (takes_codes or wanted == "quantised")


def test_a_kernel_on_cpus_is_built_for_plain_inputs_except_the_reference() -> None:
    config, fmt = layer(BY_128), NAMED_FORMATS["fp8"]
    spec = expert_spec(config, CPU, 4, 128, BF16, False, BY_128.scheme)
    for name, takes_codes in (("reference", True), ("auto", False), ("onednn", False)):
        chosen, _ = choose_for_weights(spec, name, fmt)
        assert (chosen.activation_scheme is not None) is takes_codes


@pytest.mark.parametrize(
    ("wanted", "device", "recorded"),
    [("auto", CPU, None), ("quantised", CPU, "quantised"), ("auto", GPU, "quantised"), ("exact", GPU, None)],
)
def test_answers_record_that_inputs_were_quantised(
    wanted: str, device: torch.device, recorded: str | None, tmp_path: Path
) -> None:
    sizes: dict[str, Any] = {"hidden": 128, "intermediate": 128, "top_k": 1, "vocab": 16}
    make_checkpoint("qwen3_moe", tmp_path, layers=1, experts=2, **sizes, seed=0, form="fp8")
    args = Namespace(checkpoint=tmp_path, activations=wanted, exact=False)
    assert activations_of(args, SimpleNamespace(device=device), BF16) == recorded  # type: ignore[arg-type]
