"""Codes and scales as published checkpoints store them: the tensors of a module, and config.json's words."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from xpar.engine.checkpoint.tensor_file import CheckpointError
from xpar.engine.formats.words import AWQ_ORDER, codes_of_bytes, pack_nibbles
from xpar.kernels.quantised_weight import CodeType, QuantisedWeight, WeightFormat

Tensors = dict[str, Tensor]
"""The tensors of a module by what follows its name."""
GROUPS = (128, 64, 32, 16)
"""Groups along K that GPTQ and AWQ files have, the usual first."""


@dataclass(frozen=True)
class PublishedForm:
    """A published format that can be written.

    Attributes:
        name: its name on the command line.
        weight: the format of a weight; a block of -1 columns is a group that divides every K.
        store: makes the tensors of a module.
        config: makes the quantization_config from the format and the modules that stay floats.
        experts_only: True if only routed experts are quantised.
        stacked: True if it is the format of experts that are stored in one tensor, inputs first.
    """

    name: str
    weight: WeightFormat
    store: Callable[[QuantisedWeight], Tensors]
    config: Callable[[WeightFormat, Sequence[str]], Mapping[str, Any]]
    experts_only: bool = False
    stacked: bool = False

    def weight_format(self, widths: Sequence[int]) -> WeightFormat:
        """Return the format for weights whose K are ``widths``; CheckpointError if no group divides them."""
        rows, cols = self.weight.block
        if cols >= 0:
            return self.weight
        group = next((g for g in GROUPS if math.gcd(*widths) % g == 0), None)
        if group is None:
            raise CheckpointError(
                f"format {self.name}: no group of {', '.join(map(str, GROUPS))} divides the widths "
                f"{', '.join(map(str, sorted(set(widths))))}; choose multiples of 16"
            )
        weight_format = self.weight
        return WeightFormat(
            weight_format.code,
            (rows, group),
            weight_format.scale,
            weight_format.zero_point,
            weight_format.global_scale,
        )


def _fp8(weight: QuantisedWeight) -> Tensors:
    return {".weight": weight.codes, ".weight_scale_inv": weight.scales}


def _fp8_config(weight_format: WeightFormat, floats: Sequence[str]) -> Mapping[str, Any]:
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(weight_format.block),
    }
    return {**config, "modules_to_not_convert": list(floats)} if floats else config


def _channel(weight: QuantisedWeight) -> Tensors:
    return {".weight": weight.codes, ".weight_scale": weight.scales}


def _channel_config(weight_format: WeightFormat, floats: Sequence[str]) -> Mapping[str, Any]:
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
    tokens = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}
    return _compressed("float-quantized", weights, tokens, floats)


def _packed(weight: QuantisedWeight) -> Tensors:
    rows, cols = weight.shape
    words = torch.nn.functional.pad(weight.codes, (0, -weight.codes.shape[1] % 4)).contiguous()
    return {
        ".weight_packed": words.view(torch.int32),
        ".weight_scale": weight.scales,
        ".weight_shape": torch.tensor([rows, cols]),
    }


def _packed_config(weight_format: WeightFormat, floats: Sequence[str]) -> Mapping[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": weight_format.block[1],
        "dynamic": False,
    }
    return _compressed("pack-quantized", weights, None, floats)


def _compressed(
    form: str, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None, floats: Sequence[str]
) -> Mapping[str, Any]:
    group = {"targets": ["Linear"], "format": form, "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(floats),
        "kv_cache_scheme": None,
    }


def _gptq(weight: QuantisedWeight) -> Tensors:
    """Store symmetric codes as version 1, whose zero points of 8 are 7 in the file."""
    rows, cols = weight.shape
    if rows % 8 or cols % 8:
        raise CheckpointError(f"format gptq: weights are multiples of 8, not {[rows, cols]}")
    groups, group = weight.scales.shape[1], weight.format.block[1]
    return {
        ".qweight": weight.codes.contiguous().view(torch.int32).T.contiguous(),
        ".qzeros": torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32),
        ".scales": weight.scales.T.contiguous(),
        ".g_idx": torch.arange(cols, dtype=torch.int32) // group,
    }


def _gptq_config(weight_format: WeightFormat, floats: Sequence[str]) -> Mapping[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": weight_format.block[1],
        "desc_act": False,
        "sym": True,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "dynamic": {f"-:{name.replace('.', chr(92) + '.')}$": {} for name in floats},
    }


def _awq(weight: QuantisedWeight) -> Tensors:
    rows, cols = weight.shape
    if rows % 8:
        raise CheckpointError(f"format awq: the outputs of a weight are a multiple of 8, not {rows}")
    assert weight.zeros is not None
    codes = codes_of_bytes(weight.codes, 4)[:, :cols]
    return {
        ".qweight": _interleave(codes.T),
        ".qzeros": _interleave(weight.zeros.T),
        ".scales": weight.scales.T.contiguous(),
    }


def _interleave(codes: Tensor) -> Tensor:
    """Return AWQ words [n, m / 8] of codes [n, m], one a byte."""
    places = torch.tensor(AWQ_ORDER).argsort()
    octets = codes.reshape(codes.shape[0], -1, 8)[..., places].flatten(1)
    return pack_nibbles(octets).contiguous().view(torch.int32)


def _awq_config(weight_format: WeightFormat, floats: Sequence[str]) -> Mapping[str, Any]:
    names = sorted({name.rpartition(".")[2] for name in floats if not name.startswith("lm_head")})
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": weight_format.block[1],
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": names,
    }


def _nvfp4(weight: QuantisedWeight) -> Tensors:
    assert weight.global_scale is not None
    return {
        ".weight": weight.codes,
        ".weight_scale": weight.scales,
        ".weight_scale_2": weight.global_scale,
        ".input_scale": torch.ones(()),
    }


def _nvfp4_config(weight_format: WeightFormat, floats: Sequence[str]) -> Mapping[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": list(floats)}


def _mxfp4(weight: QuantisedWeight) -> Tensors:
    *stack, rows, pairs = weight.codes.shape
    return {
        "_blocks": weight.codes.view(*stack, rows, pairs // 16, 16),
        "_scales": weight.scales.view(torch.uint8),
    }


def _mxfp4_config(weight_format: WeightFormat, floats: Sequence[str]) -> Mapping[str, Any]:
    left_out = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return {"quant_method": "mxfp4", "modules_to_not_convert": left_out}


def _fp4(weight: QuantisedWeight) -> Tensors:
    return {".weight": weight.codes.view(torch.int8), ".scale": weight.scales}


def _fp4_config(weight_format: WeightFormat, floats: Sequence[str]) -> Mapping[str, Any]:
    return {
        **_fp8_config(replace(weight_format, block=(128, 128)), ()),
        "scale_fmt": "ue8m0",
        "expert_dtype": "fp4",
    }


E8M0 = torch.float8_e8m0fnu
FORMS = {
    form.name: form
    for form in (
        PublishedForm("fp8", WeightFormat(CodeType.E4M3, (128, 128), torch.float32), _fp8, _fp8_config),
        PublishedForm(
            "fp8-channel", WeightFormat(CodeType.E4M3, (1, 0), torch.bfloat16), _channel, _channel_config
        ),
        PublishedForm(
            "int4", WeightFormat(CodeType.INT4, (1, 32), torch.bfloat16), _packed, _packed_config, True
        ),
        PublishedForm("gptq", WeightFormat(CodeType.INT4, (1, -1), torch.float16), _gptq, _gptq_config),
        PublishedForm("awq", WeightFormat(CodeType.INT4, (1, -1), torch.float16, True), _awq, _awq_config),
        PublishedForm(
            "nvfp4",
            WeightFormat(CodeType.E2M1, (1, 16), torch.float8_e4m3fn, global_scale=True),
            _nvfp4,
            _nvfp4_config,
        ),
        PublishedForm("fp4", WeightFormat(CodeType.E2M1, (1, 32), E8M0), _fp4, _fp4_config, True),
        PublishedForm("mxfp4", WeightFormat(CodeType.E2M1, (1, 32), E8M0), _mxfp4, _mxfp4_config, True, True),
    )
}
"""The formats that can be written, by name."""
