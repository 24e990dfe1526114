"""Every published layout against its formula: values, slices, bytes read, and codes for kernels."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import quantised_files as formulas
import torch
from quantised_cases import CASES, Case
from safetensors.torch import save_file

from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.formats.quantised_checkpoint import open_checkpoint

MODULE = "model.layers.0.m.down"
NAME = f"{MODULE}.weight"


def write(path: Path, case: Case, tensors: dict[str, torch.Tensor]) -> None:
    config = {"model_type": "none", "dtype": "float16"}
    if case.config:
        config["quantization_config"] = case.config  # type: ignore[assignment]
    (path / "config.json").write_text(json.dumps(config))
    for name, value in case.files.items():
        (path / name).write_text(json.dumps(value))
    plain = {"model.norm.weight": torch.ones(3), f"{MODULE}.bias": torch.zeros(2)}
    save_file(
        {**plain, **{MODULE + suffix: tensor.contiguous() for suffix, tensor in tensors.items()}},
        path / "model.safetensors",
    )


def made(case: Case, path: Path, seed: int) -> tuple[Checkpoint, dict[str, torch.Tensor], torch.Tensor]:
    """Write the case; return its checkpoint, its tensors, and the weight by the formula."""
    tensors = case.make(torch.Generator().manual_seed(seed))
    write(path, case, tensors)
    return open_checkpoint(path), tensors, case.decode(tensors)


def assert_equal(found: torch.Tensor, expected: torch.Tensor, ulps: int) -> None:
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=ulps * 2.4e-7, atol=0.0)
    assert torch.equal(torch.signbit(found), torch.signbit(expected))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_are_those_of_the_formula(case: Case, tmp_path: Path, fresh_seed: int) -> None:
    checkpoint, _, expected = made(case, tmp_path, fresh_seed)
    assert sorted(checkpoint.names()) == [f"{MODULE}.bias", NAME, "model.norm.weight"]
    assert checkpoint.entry(NAME).shape == tuple(expected.shape)
    assert checkpoint.dtype == torch.bfloat16 and "quantization_config" not in checkpoint.config
    assert_equal(checkpoint.read(NAME, expect_shape=tuple(expected.shape)), expected, case.ulps)
    out = torch.empty(expected.shape, dtype=torch.bfloat16)
    assert_equal(checkpoint.read(NAME, out=out), expected.bfloat16(), 2**16 if case.ulps else 0)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_any_slice_is_that_of_the_whole(case: Case, tmp_path: Path, fresh_seed: int) -> None:
    checkpoint, _, expected = made(case, tmp_path, fresh_seed)
    generator = torch.Generator().manual_seed(fresh_seed)
    for _ in range(12):
        sides = [
            sorted(torch.randint(size + 1, (2,), generator=generator).tolist()) for size in expected.shape
        ]
        rows, cols = (slice(*side) for side in sides)
        assert_equal(checkpoint.read(NAME, rows, cols), expected[rows, cols], case.ulps)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_codes_for_kernels_are_the_same_weight(case: Case, tmp_path: Path, fresh_seed: int) -> None:
    checkpoint, tensors, expected = made(case, tmp_path, fresh_seed)
    if not case.packs:
        assert checkpoint.weight_format(NAME) is None
        with pytest.raises(ValueError, match=r"down\.weight has no codes that kernels can compute from"):
            checkpoint.read_quantised(NAME)
        return
    form = checkpoint.weight_format(NAME)
    weight = checkpoint.read_quantised(NAME)
    assert weight.format == form
    assert_equal(weight.dequantise(), expected, case.ulps)
    assert weight.nbytes <= 1.1 * sum(tensor.nbytes for tensor in tensors.values())
    units = checkpoint.smallest_cut(NAME)
    for side, unit in enumerate(units):
        size = expected.shape[side]
        for begin in range(unit, size, max(unit, size // 4 // unit * unit)):
            part = [slice(None), slice(None)]
            part[side] = slice(begin, min(begin + unit, size))
            cut = checkpoint.read_quantised(NAME, *part)
            assert cut.format == form
            assert_equal(cut.dequantise(), expected[tuple(part)], case.ulps)
        if block := form.block[side]:
            smaller = [*form.block]
            smaller[side] = next(d for d in range(block // 2 or 1, 0, -1) if block % d == 0)
            finer = checkpoint.read_quantised(NAME, block=(smaller[0], smaller[1]))
            assert finer.format.block == tuple(smaller)
            assert_equal(finer.dequantise(), expected, case.ulps)
        if unit > 1:
            part[side] = slice(1, size)
            with pytest.raises(ValueError, match=f"is no multiple of {unit}, the block of its format"):
                checkpoint.read_quantised(NAME, *part)


def test_many_short_runs_are_read_as_whole_rows(tmp_path: Path) -> None:
    """Of a weight whose inputs come first, and of which a slice of outputs is wanted."""
    tensors = {
        ".qweight": torch.arange(256 * 16, dtype=torch.int32).view(256, 16) * 7919,
        ".qzeros": torch.full((2, 16), 0x35353535, dtype=torch.int32),
        ".scales": torch.rand(2, 128).half() + 0.1,
    }
    case = next(case for case in CASES if case.name == "awq")
    write(tmp_path, replace(case, config={**case.config, "group_size": 128}), tensors)
    checkpoint = open_checkpoint(tmp_path)
    checkpoint.entry(NAME)
    before = checkpoint.bytes_read
    found = checkpoint.read(NAME, rows=slice(16, 32))
    assert checkpoint.bytes_read - before == 256 * 16 * 4 + 2 * 2 * 4 + 2 * 16 * 2
    assert torch.equal(found, formulas.of_awq(tensors, 128)[16:32])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_slice_reads_no_codes_but_its_own(case: Case, tmp_path: Path, fresh_seed: int) -> None:
    checkpoint, tensors, expected = made(case, tmp_path, fresh_seed)
    codes = next(t for name, t in tensors.items() if name in (".weight", ".weight_packed", ".qweight"))
    others = sum(tensor.nbytes for tensor in tensors.values()) - codes.nbytes
    checkpoint.entry(NAME)
    rows, cols = expected.shape
    checkpoint.read(NAME, slice(0, 1), slice(0, 1))  # reads what says the shape and the order of inputs
    for part in (
        (slice(8, 16), slice(0, cols)),
        (slice(0, rows), slice(32, 64)),
        (slice(3, 4), slice(40, 41)),
    ):
        before = checkpoint.bytes_read
        checkpoint.read(NAME, *part)
        wide = [
            math.ceil(p.stop / unit) * unit - p.start // unit * unit
            for p, unit in zip(part, case.unit, strict=True)
        ]
        least = codes.nbytes * wide[0] * wide[1] / (rows * cols)
        # Of scales, zero points and the order of inputs it reads a part, or at most all.
        assert math.floor(least) <= checkpoint.bytes_read - before <= math.ceil(1.1 * least) + others
        if part[0].stop - part[0].start == 1:
            assert checkpoint.bytes_read - before < codes.nbytes / 8 + others
