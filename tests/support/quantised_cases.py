"""One quantised weight of every published layout, with all codes, odd shapes and extreme scales."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import quantised_files as formulas
import torch
from quantised_files import Stored
from torch import Tensor

CODES = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
"""Every e4m3 code but NaN."""


@dataclass(frozen=True)
class Case:
    """``make`` draws the tensors of a module; ``decode`` is the formula of the format.

    ``unit``: rows and columns that cannot be read apart. ``packs``: whether codes go to kernels as they are.
    """

    name: str
    config: Mapping[str, Any]
    make: Callable[[torch.Generator], dict[str, Tensor]]
    decode: Callable[[Stored], Tensor]
    unit: tuple[int, int] = (1, 1)
    packs: bool = True
    ulps: int = 0
    files: Mapping[str, Any] = field(default_factory=dict)


def fp8(rows: int, cols: int, g: torch.Generator) -> Tensor:
    """Draw codes of which the first are all there are."""
    codes = CODES[torch.randint(len(CODES), (rows * cols,), generator=g)]
    codes[: len(CODES)] = CODES
    return codes.view(rows, cols).view(torch.float8_e4m3fn)


def any_bytes(*shape: int, g: torch.Generator) -> Tensor:
    drawn = torch.randint(256, shape, generator=g, dtype=torch.uint8)
    drawn.view(-1)[:256] = torch.arange(256, dtype=torch.uint8)[: drawn.numel()]
    return drawn


def any_words(*shape: int, g: torch.Generator) -> Tensor:
    return any_bytes(*shape[:-1], 4 * shape[-1], g=g).view(torch.int32)


def scales(*shape: int, g: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape, generator=g) * 0.9 + 0.1).to(dtype)


def exponents(*shape: int, g: torch.Generator) -> Tensor:
    """Draw e8m0 bytes, of which the first are the least, the largest and 1."""
    drawn = torch.randint(110, 140, shape, generator=g, dtype=torch.uint8)
    drawn.view(-1)[:4] = torch.tensor([0, 1, 127, 254], dtype=torch.uint8)
    return drawn


def ceil(size: int, block: int) -> int:
    return -(-size // block)


def fp8_case(name: str, scale: Callable[[torch.Generator], Tensor], suffix: str, **config: Any) -> Case:
    block = config.get("weight_block_size", (1, 32))
    made = {"quant_method": "fp8", "activation_scheme": "dynamic", **config}
    return Case(
        name,
        made,
        lambda g: {".weight": fp8(300, 200, g), suffix: scale(g)},
        lambda stored: formulas.of_bytes(stored, suffix, block),
    )


def group(form: str, bits: int, kind: str, **weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, **weights}}
        },
        "ignore": ["lm_head"],
    }


def packed(
    name: str,
    bits: int,
    rows: int,
    cols: int,
    size: int | None,
    asymmetric: bool = False,
    order: str | None = None,
) -> Case:
    strategy = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}
    groups = 1 if size is None else ceil(cols, size)

    def make(g: torch.Generator) -> dict[str, Tensor]:
        made = {
            ".weight_packed": any_words(rows, ceil(cols * bits, 32), g=g),
            ".weight_scale": scales(rows, groups, g=g, dtype=torch.bfloat16),
            ".weight_shape": torch.tensor([rows, cols], dtype=torch.int64 if bits == 4 else torch.int32),
        }
        zeros = {".weight_zero_point": any_words(ceil(rows * bits, 32), groups, g=g)} if asymmetric else {}
        if order is not None:
            usual = torch.arange(cols, dtype=torch.int32) // (size or cols)
            drawn = usual[torch.randperm(cols, generator=g)]
            zeros[".weight_g_idx"] = drawn if order == "drawn" else torch.full_like(drawn, -1)
        return {**made, **zeros}

    return Case(
        name,
        group("pack-quantized", bits, "int", symmetric=not asymmetric, **strategy),
        make,
        lambda stored: formulas.of_packed(stored, bits, size),
        unit=(1, 32 // bits),
        packs=order != "drawn",
    )


def integers(name: str, size: int | None, asymmetric: bool = False) -> Case:
    groups = 1 if size is None else 4
    strategy = {"strategy": "channel"} if size is None else {"strategy": "group", "group_size": size}

    def make(g: torch.Generator) -> dict[str, Tensor]:
        zero = torch.randint(-128, 128, (40, groups), generator=g).to(torch.int8)
        return {
            ".weight": any_bytes(40, 4 * 32, g=g).view(torch.int8),
            ".weight_scale": scales(40, groups, g=g),
            **({".weight_zero_point": zero} if asymmetric else {}),
        }

    return Case(
        name,
        group("int-quantized", 8, "int", symmetric=not asymmetric, **strategy),
        make,
        lambda stored: formulas.of_bytes(stored, ".weight_scale", (1, size or 128)),
    )


def pairs(name: str, codes: str, scale: str, config: Mapping[str, Any], signed: bool = False) -> Case:
    def make(g: torch.Generator) -> dict[str, Tensor]:
        made = any_bytes(33, 80, g=g)
        exponent = exponents(33, 5, g=g)
        return {
            codes: made.view(torch.int8) if signed else made,
            scale: exponent.view(torch.float8_e8m0fnu) if signed else exponent,
        }

    return Case(name, config, make, lambda stored: formulas.of_groups(stored, codes, scale, 32), unit=(1, 2))


def nvfp4(name: str, config: Mapping[str, Any], reciprocal: bool, **files: Any) -> Case:
    codes = ".weight_packed" if reciprocal else ".weight"

    def make(g: torch.Generator) -> dict[str, Tensor]:
        scale = torch.randint(1, 127, (33, 5), generator=g, dtype=torch.uint8).view(torch.float8_e4m3fn)
        factor = (
            {".weight_global_scale": torch.tensor([37.3])}
            if reciprocal
            else {
                ".weight_scale_2": torch.tensor(0.0173),
                ".input_scale": torch.tensor(0.0),
            }
        )
        return {codes: any_bytes(33, 40, g=g), ".weight_scale": scale, **factor}

    def decode(stored: Stored) -> Tensor:
        values = formulas.of_groups(stored, codes, ".weight_scale", 16)
        return values / stored[".weight_global_scale"] if reciprocal else values * stored[".weight_scale_2"]

    return Case(name, config, make, decode, unit=(1, 2), ulps=int(reciprocal), files=files)


def gptq(
    name: str,
    bits: int = 4,
    version: int = 1,
    symmetric: bool = False,
    reordered: bool = False,
    size: int = 32,
    signed: bool = False,
    dtype: torch.dtype = torch.float16,
    **config: Any,
) -> Case:
    rows, cols, per = 40, 96, 32 // bits
    groups = ceil(cols, size if size > 0 else cols)
    made = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": size,
        "desc_act": reordered,
        "sym": symmetric,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        **config,
    }

    def make(g: torch.Generator) -> dict[str, Tensor]:
        order = torch.arange(cols) // (size if size > 0 else cols)
        zero = 0x77777777 if bits == 4 else 0x7F7F7F7F
        if symmetric:
            word = zero if version == 1 else zero + (0x11111111 if bits == 4 else 0x01010101)
            zeros = torch.full((groups, rows // per), word, dtype=torch.int64).to(torch.int32)
        else:
            zeros = any_words(groups, rows // per, g=g)
        sign = torch.randint(0, 2, (groups, rows), generator=g) * 2 - 1 if signed else 1
        return {
            ".qweight": any_words(cols // per, rows, g=g),
            ".qzeros": zeros,
            ".scales": (scales(groups, rows, g=g) * sign).to(dtype),
            ".g_idx": (order[torch.randperm(cols, generator=g)] if reordered else order).int(),
        }

    return Case(
        name,
        made,
        make,
        lambda stored: formulas.of_gptq(stored, bits, version == 1),
        unit=(1, per),
        packs=not reordered,
    )


def awq(name: str, signed: bool = False, **config: Any) -> Case:
    def make(g: torch.Generator) -> dict[str, Tensor]:
        sign = torch.randint(0, 2, (3, 40), generator=g) * 2 - 1 if signed else 1
        return {
            ".qweight": any_words(96, 5, g=g),
            ".qzeros": any_words(3, 5, g=g),
            ".scales": (scales(3, 40, g=g) * sign).half(),
        }

    made = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "version": "gemm",
        **config,
    }
    return Case(name, made, make, lambda stored: formulas.of_awq(stored, 32), unit=(8, 2))


BLOCK = {"weight_block_size": [128, 128]}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
CASES = (
    fp8_case("fp8-block", lambda g: scales(3, 2, g=g), ".weight_scale_inv", **BLOCK),
    fp8_case(
        "fp8-block-bf16", lambda g: scales(3, 2, g=g, dtype=torch.bfloat16), ".weight_scale_inv", **BLOCK
    ),
    fp8_case(
        "fp8-block-e8m0",
        lambda g: exponents(3, 2, g=g).view(torch.float8_e8m0fnu),
        ".weight_scale_inv",
        scale_fmt="ue8m0",
        **BLOCK,
    ),
    fp8_case("deepseek_v4-block", lambda g: scales(3, 2, g=g), ".scale", **BLOCK),
    fp8_case("fp8-tensor", lambda g: scales(g=g), ".weight_scale"),
    fp8_case("fp8-tensor-of-one", lambda g: scales(1, g=g), ".weight_scale_inv", **BLOCK),
    fp8_case("fp8-rows", lambda g: scales(300, g=g, dtype=torch.float16), ".weight_scale"),
    fp8_case("fbgemm", lambda g: scales(300, 1, g=g), ".weight_scale", quant_method="fbgemm_fp8"),
    fp8_case("mxfp8", lambda g: exponents(300, 7, g=g), ".weight_scale_inv", quant_method="mxfp8"),
    Case(
        "ct-float-block",
        group("float-quantized", 8, "float", strategy="block", block_structure=[128, 128]),
        lambda g: {".weight": fp8(300, 200, g), ".weight_scale": scales(3, 2, g=g)},
        lambda stored: formulas.of_bytes(stored, ".weight_scale", (128, 128)),
    ),
    Case(
        "ct-float-channel",
        group("float-quantized", 8, "float", strategy="channel"),
        lambda g: {".weight": fp8(300, 200, g), ".weight_scale": scales(300, 1, g=g, dtype=torch.bfloat16)},
        lambda stored: formulas.of_bytes(stored, ".weight_scale", None),
    ),
    Case(
        "ct-float-tensor-static",
        group("float-quantized", 8, "float", strategy="tensor"),
        lambda g: {
            ".weight": fp8(300, 200, g),
            ".weight_scale": scales(1, g=g),
            ".input_scale": torch.tensor([float("nan")]),
        },
        lambda stored: formulas.of_bytes(stored, ".weight_scale", None),
    ),
    packed("ct-int4-g32", 4, 33, 96, 32),
    packed("ct-int4-odd", 4, 33, 91, 32),
    packed("ct-int4-channel", 4, 33, 96, None),
    packed("ct-int4-asymmetric", 4, 33, 96, 32, asymmetric=True),
    packed("ct-int4-actorder", 4, 33, 96, 32, asymmetric=True, order="drawn"),
    packed("ct-int4-unused-order", 4, 33, 96, 32, order="unused"),
    packed("ct-int8-g32", 8, 33, 90, 32),
    packed("ct-int8-channel-asymmetric", 8, 33, 96, None, asymmetric=True),
    integers("ct-int-channel", None),
    integers("ct-int-group-asymmetric", 32, asymmetric=True),
    pairs(
        "ct-mxfp4",
        ".weight_packed",
        ".weight_scale",
        group("mxfp4-pack-quantized", 4, "float", strategy="group", group_size=32),
    ),
    pairs(
        "deepseek_v4-fp4", ".weight", ".scale", {"quant_method": "fp8", "expert_dtype": "fp4", **BLOCK}, True
    ),
    nvfp4(
        "ct-nvfp4",
        group("nvfp4-pack-quantized", 4, "float", strategy="tensor_group", group_size=16),
        reciprocal=True,
    ),
    nvfp4("modelopt-nvfp4", MODELOPT, reciprocal=False),
    nvfp4(
        "modelopt-nvfp4-own-file",
        {},
        False,
        **{"hf_quant_config.json": {"quantization": {"quant_algo": "NVFP4", "exclude_modules": ["lm_head"]}}},
    ),
    Case(
        "modelopt-fp8",
        {**MODELOPT, "quant_algo": "FP8"},
        lambda g: {".weight": fp8(300, 200, g), ".weight_scale": scales(g=g), ".input_scale": scales(g=g)},
        lambda stored: formulas.of_bytes(stored, ".weight_scale", None),
    ),
    gptq("gptq-v1"),
    gptq("gptq-v1-symmetric", symmetric=True),
    gptq("gptq-v2", version=2),
    gptq("gptq-v2-symmetric", version=2, symmetric=True),
    gptq("gptq-v2-that-says-v1", version=2, symmetric=True, checkpoint_format="gptq"),
    gptq("gptq-8", bits=8, symmetric=True),
    gptq("gptq-8-asymmetric", bits=8),
    gptq("gptq-all-of-k", size=-1, dtype=torch.bfloat16),
    gptq("gptq-desc_act", reordered=True),
    gptq("gptq-8-desc_act", bits=8, symmetric=True, reordered=True),
    gptq("gptq-dynamic", group_size=128, dynamic={r"-:.*gate.*": {}, r"+:.*m\.down": {"group_size": 32}}),
    gptq(
        "auto-round-gptq",
        symmetric=True,
        signed=True,
        quant_method="auto-round",
        packing_format="auto_round:auto_gptq",
    ),
    awq("awq"),
    awq("auto-round-awq", signed=True, quant_method="auto-round", packing_format="auto_round:auto_awq"),
)
