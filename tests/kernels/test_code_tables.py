"""Decisions on the host about layers of codes: formats, heights of tiles, and batches without a sort."""

from dataclasses import replace

import pytest
import torch

from xpar.kernels.contracts import Activation, ExpertInput, ExpertSpec
from xpar.kernels.gpu.code_tables import (
    default_code_table,
    default_nibble_table,
    why_not_format,
)
from xpar.kernels.gpu.nibble_experts import NibbleExperts
from xpar.kernels.gpu.tile_tables import Machine
from xpar.kernels.quantised_weight import ActivationScheme, CodeType, WeightFormat
from xpar.kernels.registry import KERNELS, choose_kernel

H200 = Machine(sms=132, capability=(9, 0))
TAKEN = [
    WeightFormat(CodeType.E4M3, (128, 128), torch.float32),
    WeightFormat(CodeType.E4M3, (1, 0), torch.bfloat16),
    WeightFormat(CodeType.INT4, (1, 32), torch.bfloat16),
    WeightFormat(CodeType.INT4, (1, 128), torch.float16, zero_point=True),
    WeightFormat(CodeType.E2M1, (1, 32), torch.float8_e8m0fnu),
    WeightFormat(CodeType.E2M1, (1, 16), torch.float8_e4m3fn, global_scale=True),
]
REFUSED = {
    WeightFormat(CodeType.E4M3, (1, 32), torch.float8_e8m0fnu): "blocks of a multiple of 128 columns",
    WeightFormat(CodeType.INT8, (1, 0), torch.float32): "does not compute from int8 1xall weights",
    WeightFormat(CodeType.INT4, (1, 16), torch.float16): "groups of 32, 64 or 128 columns of a row",
    WeightFormat(CodeType.INT4, (128, 128), torch.float16): "groups of 32, 64 or 128 columns of a row",
}


@pytest.mark.parametrize("fmt", TAKEN, ids=str)
def test_triton_is_chosen_for_the_formats_that_it_takes(fmt: WeightFormat) -> None:
    here = tuple(
        replace(entry, why_unavailable=lambda spec: None) if entry.name == "triton" else entry
        for entry in KERNELS
    )
    spec = ExpertSpec(8, 256, 128, torch.bfloat16, Activation("silu"), "cuda", weight_format=fmt)
    assert why_not_format(fmt) is None and choose_kernel(spec, kernels=here).name == "triton"


@pytest.mark.parametrize("fmt", REFUSED, ids=str)
def test_other_formats_are_refused_by_name(fmt: WeightFormat) -> None:
    reason = why_not_format(fmt)
    assert reason is not None and REFUSED[fmt] in reason and str(fmt) in reason


def test_heights_follow_the_average_number_of_rows() -> None:
    table = default_code_table(H200, terms=1)
    rows = [table.height(slots, 64).gate_up.rows for slots in (8, 704, 705, 1536, 1537, 10**6)]
    assert rows == [16, 16, 32, 32, 64, 64]
    with pytest.raises(ValueError, match="gate_up has tiles of 16 rows and down of 32"):
        replace(table.heights[0], down=table.heights[1].down)
    with pytest.raises(ValueError, match="64 columns: must be 128"):
        replace(table.heights[0], gate_up=replace(table.heights[0].gate_up, columns=64))


@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
def test_copies_in_flight_fit_every_machine(capability: tuple[int, int], terms: int) -> None:
    machine = Machine(100, capability)
    shared = 227 if machine.family in ("hopper", "blackwell") else 163 if machine.family == "ampere" else 99
    for height in default_code_table(machine, terms).heights:
        for tile, halves in ((height.gate_up, 2), (height.down, 1)):
            step = (terms * tile.rows + halves * tile.columns) * tile.depth
            programs = 1 if machine.family == "hopper" else tile.per_sm  # there, as measured
            assert tile.stages == 2 or programs * tile.stages * step <= shared << 10


def test_nibbles_are_decoded_where_that_is_faster_and_allowed() -> None:
    """With one scale for 128 inputs always, with more scales for many rows, otherwise never."""
    int4, mxfp4 = TAKEN[3], TAKEN[4]

    def decoded(machine: Machine, fmt: WeightFormat, can_decode: bool) -> list[bool]:
        table = default_nibble_table(machine, fmt, can_decode=can_decode)
        assert table.heights[-1].average == float("inf")
        return [table.height(slots, 64).decoded for slots in (8, 1024, 3000, 10**6)]

    assert decoded(H200, int4, True) == [True] * 4
    assert decoded(H200, mxfp4, True) == [False, False, True, True]
    assert decoded(H200, int4, False) == decoded(Machine(100, (8, 0)), mxfp4, True) == [False] * 4
    with pytest.raises(ValueError, match="all heights of the table decode weights"):
        default_nibble_table(H200, int4, can_decode=True).without_decoded()


def test_slots_are_sorted_where_experts_would_be_read_twice() -> None:
    """Four tokens of 8 slots: among 128 small experts hardly any is read twice, among 64 large ones many."""

    def is_tiny(tokens: int, experts: int, hidden: int, width: int) -> bool:
        spec = ExpertSpec(
            experts, hidden, width, torch.bfloat16, Activation("silu"), "meta", weight_format=TAKEN[3]
        )
        x = ExpertInput(
            torch.empty(tokens, hidden, dtype=torch.bfloat16, device="meta"),
            torch.empty(tokens, 8, dtype=torch.int32, device="meta"),
            torch.empty(tokens, 8, device="meta"),
        )
        return NibbleExperts(spec, None, H200).is_tiny(x)

    assert is_tiny(4, 128, 2048, 768) and not is_tiny(4, 64, 7168, 2048)
    assert is_tiny(1, 8, 7168, 2048)  # one token takes each expert once


def test_a_scheme_has_groups_of_128_or_whole_rows() -> None:
    assert ActivationScheme(0).group == 0
    with pytest.raises(ValueError, match="activation group 64: must be 128 inputs, or 0"):
        ActivationScheme(64)
