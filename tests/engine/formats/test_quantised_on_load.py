"""Weights in floats that are quantised while they are read: a slice has the codes of the whole weight."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.checkpoint.tensor_file import CheckpointError
from xpar.engine.formats import quantised_on_load as module
from xpar.engine.formats.quantised_on_load import QuantisedOnLoad, fit_format, relative_errors
from xpar.engine.layer.reference import relative_error
from xpar.kernels.quantisation import NAMED_FORMATS, quantise
from xpar.kernels.quantised_weight import WeightFormat

ROWS, COLS = 300, 320
SLICES = [
    (slice(0, ROWS), slice(0, COLS)),
    (slice(64, 300), slice(64, 320)),
    (slice(192, 256), slice(128, 192)),
]


def write(path: Path, **tensors: torch.Tensor) -> Checkpoint:
    (path / "config.json").write_text(json.dumps({"dtype": "bfloat16"}))
    save_file(tensors, path / "model.safetensors")
    return Checkpoint(path)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("stacked", [False, True], ids=["single", "stacked inputs first"])
@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_slices_are_those_of_the_quantised_weight(
    tmp_path: Path, fresh_seed: int, name: str, stacked: bool
) -> None:
    form, stack = NAMED_FORMATS[name], drawn(fresh_seed, 2, ROWS, COLS)
    stored = stack.mT.contiguous() if stacked else stack[1].contiguous()
    read = QuantisedOnLoad(write(tmp_path, w=stored), {"w": form}, ["w"] if stacked else [])
    index, expected = (
        (1, quantise(stack[1], form).dequantise())
        if stacked
        else (None, quantise(stack[1], form).dequantise())
    )
    assert read.weight_format("w") == form
    for rows, cols in SLICES if not form.global_scale else SLICES[:1]:
        presented = (cols, rows) if stacked else (rows, cols)
        found = read.read("w", *presented, index=index)
        assert torch.equal(found.mT if stacked else found, expected[rows, cols])
        smaller = (min(form.block[0], 64), min(form.block[1], 64))
        if form.block[0] == 1 or rows.start % 64 == 0:
            codes = read.read_quantised("w", rows, cols, index, smaller)
            assert torch.equal(codes.dequantise(), expected[rows, cols])


def error_of(weight: torch.Tensor, form: WeightFormat) -> float:
    return relative_error(quantise(weight, form).dequantise(), weight.float())


@pytest.mark.parametrize("name", [name for name, form in NAMED_FORMATS.items() if not form.global_scale])
def test_pieces_are_those_of_the_weight(
    tmp_path: Path, fresh_seed: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    form, weight = NAMED_FORMATS[name], drawn(fresh_seed, ROWS, COLS)
    monkeypatch.setattr(module, "PIECE_BYTES", 4 * COLS * 70)
    read = QuantisedOnLoad(write(tmp_path, w=weight), {"w": form}, [])
    expected = quantise(weight, form)
    assert torch.equal(read.read_quantised("w").dequantise(), expected.dequantise())
    assert relative_errors([read.squares])[0] == pytest.approx(error_of(weight, form), rel=1e-4)


def test_errors_are_counted_by_layer(tmp_path: Path, fresh_seed: int) -> None:
    form = NAMED_FORMATS["int4"]
    names = ["model.layers.3.a", "model.layers.3.b", "model.layers.12.a", "head"]
    weights = {name: drawn(fresh_seed + n, 8, 128) * (n + 1) for n, name in enumerate(names)}
    read = QuantisedOnLoad(write(tmp_path, **weights), dict.fromkeys(names, form), [])
    for name in names:
        read.read_quantised(name)
    whole, layers = relative_errors([read.squares, read.squares])
    both = torch.cat([weights[name] for name in names[:2]])
    assert list(layers) == [-1, 3, 12]
    assert layers[3] == pytest.approx(error_of(both, form), rel=1e-4)
    everything = torch.cat(list(weights.values()))
    assert whole == pytest.approx(error_of(everything, form), rel=1e-4)


def test_groups_fit_all_widths() -> None:
    assert [fit_format("int4", widths).block for widths in ([256, 384], [192], [96, 64])] == [
        (1, 128),
        (1, 64),
        (1, 32),
    ]
    assert fit_format("int8", [33]).block == (1, 0) and fit_format("fp8", [33]).block == (128, 128)
    with pytest.raises(
        CheckpointError, match="format int4: no group of 128, 64, 32 divides the widths 48, 64 of"
    ):
        fit_format("int4", [64, 48])
    with pytest.raises(CheckpointError, match="format mxfp4: no group of 32 divides the widths 48 of"):
        fit_format("mxfp4", [48])


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    bad = torch.full((4, 128), float("inf"), dtype=torch.bfloat16)
    read = QuantisedOnLoad(write(tmp_path, w=bad), {"w": NAMED_FORMATS["int8"]}, [])
    with pytest.raises(
        CheckpointError, match=r"tensor w: weights of shape \(4, 128\) have values that are not"
    ):
        read.read_quantised("w")
