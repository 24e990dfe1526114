"""The one form of quantised weights against its formula, written out code by code."""

import pytest
import torch
from quantised_weights import FORMATS, draw

from xpar.kernels.contracts import Activation, ExpertInput, ExpertSpec
from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat
from xpar.kernels.reference import ReferenceExperts, routed_experts
from xpar.kernels.registry import KERNELS

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def value(fmt: WeightFormat, codes: torch.Tensor, n: int, k: int) -> float:
    if not fmt.code.is_nibble:
        return float(codes[n, k])
    nibble = int(codes[n, k // 2]) >> (4 * (k % 2)) & 15
    return E2M1[nibble] if fmt.code is CodeType.E2M1 else nibble - 8


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 33), (130, 129), (1, 1)], ids=str)
def test_every_value_is_that_of_the_formula(
    fmt: WeightFormat, shape: tuple[int, int], fresh_seed: int
) -> None:
    weight = draw(fmt, *shape, torch.Generator().manual_seed(fresh_seed))
    found = weight.dequantise()
    rows, cols = shape
    for n in range(rows):
        for k in range(0, cols, 7):
            block = n // (fmt.block[0] or rows), k // (fmt.block[1] or cols)
            zero = 0 if weight.zeros is None else int(weight.zeros[block]) - 8
            factor = 1.0 if weight.global_scale is None else float(weight.global_scale)
            expected = (value(fmt, weight.codes, n, k) - zero) * float(weight.scales[block].float()) * factor
            assert float(found[n, k]) == pytest.approx(expected, rel=1e-6)


def test_a_stack_gives_each_expert_its_own(fresh_seed: int) -> None:
    g = torch.Generator().manual_seed(fresh_seed)
    fmt = FORMATS[-1]
    weights = [draw(fmt, 6, 40, g) for _ in range(3)]
    stack = QuantisedWeight(
        fmt,
        torch.stack([w.codes for w in weights]),
        torch.stack([w.scales.view(torch.uint8) for w in weights]).view(fmt.scale),
        40,
        None,
        torch.stack([w.global_scale for w in weights if w.global_scale is not None]),
    )
    assert stack.shape == (3, 6, 40)
    for expert, weight in enumerate(weights):
        assert torch.equal(stack[expert].dequantise(), weight.dequantise())
        assert torch.equal(stack.dequantise()[expert], weight.dequantise())


def test_tensors_that_do_not_fit_their_format_are_refused() -> None:
    fmt = FORMATS[0]
    codes = torch.zeros(130, 129).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"scales is \(1, 2\) torch.float32, expected \(2, 2\)"):
        QuantisedWeight(fmt, codes, torch.ones(1, 2), 129)
    with pytest.raises(ValueError, match=r"zeros is None None, expected \(5, 2\)"):
        QuantisedWeight(FORMATS[5], torch.zeros(5, 16, dtype=torch.uint8), torch.ones(5, 2).half(), 32)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_reference_kernel_computes_with_the_dequantised_weights(
    fmt: WeightFormat, fresh_seed: int
) -> None:
    g = torch.Generator().manual_seed(fresh_seed)
    spec = ExpertSpec(3, 40, 24, torch.bfloat16, Activation("silu"), weight_format=fmt)
    gate_up = [draw(fmt, 48, 40, g) for _ in range(3)]
    down = [draw(fmt, 40, 24, g) for _ in range(3)]
    kernel = ReferenceExperts(spec)
    for expert in range(3):
        kernel.load_quantised(expert, gate_up[expert], down[expert])
    x = (torch.randn(5, 40, generator=g) / 64).bfloat16()
    topk_ids = torch.randint(-1, 3, (5, 2), generator=g, dtype=torch.int32)
    topk_weights = torch.rand(5, 2, generator=g)
    expected = routed_experts(
        x.float(),
        topk_ids,
        topk_weights,
        torch.stack([w.dequantise() for w in gate_up]),
        torch.stack([w.dequantise() for w in down]),
        spec.activation,
    )
    torch.testing.assert_close(kernel.compute(ExpertInput(x, topk_ids, topk_weights)), expected.bfloat16())
    with pytest.raises(ValueError, match=r"gate_up is in plain numbers, the kernel was built for"):
        kernel.load_expert(0, gate_up[0].dequantise(), down[0].dequantise())


def test_a_kernel_that_has_no_format_says_so() -> None:
    spec = ExpertSpec(3, 64, 32, torch.bfloat16, Activation("silu"), weight_format=FORMATS[0])
    onednn = next(entry for entry in KERNELS if entry.name == "onednn")
    assert onednn.why_not(spec) == "does not compute from e4m3 128x128 weights"
