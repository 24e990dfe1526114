"""The forms in which ``xpar quantize`` writes weights: those of compressed-tensors and of fp8 checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xpar.engine.formats.published import FORMS, PublishedForm, Tensors
from xpar.engine.formats.quantised_on_load import Quantisation
from xpar.kernels.quantised_weight import QuantisedWeight, WeightFormat

EXPERTS = r"re:.*\.experts\.\d+\..*"
"""The experts among the targets of a config."""


@dataclass(frozen=True)
class CompressedForm:
    """A scheme of compressed-tensors.

    Attributes:
        name: what config.json calls the form of the tensors.
        store: makes the tensors of a module.
        scheme: makes the scheme of weights, besides the number of bits.
        bits: bits of a code.
        kind: ``int`` or ``float``.
    """

    name: str
    store: Callable[[QuantisedWeight], Tensors]
    scheme: Callable[[WeightFormat], Mapping[str, Any]]
    bits: int
    kind: str

    def group(self, weight_format: WeightFormat, targets: Sequence[str]) -> Mapping[str, Any]:
        """Return the group of ``config_groups`` for weights in ``weight_format``."""
        weights = {"num_bits": self.bits, "type": self.kind, "symmetric": True, "dynamic": False}
        return {
            "targets": list(targets),
            "format": self.name,
            "weights": {**weights, **self.scheme(weight_format)},
            "input_activations": None,
            "output_activations": None,
        }


def _bytes(weight: QuantisedWeight) -> Tensors:
    return {".weight": weight.codes, ".weight_scale": weight.scales}


def _words(weight: QuantisedWeight) -> Tensors:
    """Store integers with an offset, in words along K; two nibbles are a byte already."""
    is_nibble = weight.format.code.is_nibble
    codes = weight.codes if is_nibble else weight.codes.view(torch.uint8) ^ 0x80
    words = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4)).contiguous()
    return {
        ".weight_packed": words.view(torch.int32),
        ".weight_scale": weight.scales,
        ".weight_shape": torch.tensor(weight.shape),
    }


def _pairs(weight: QuantisedWeight) -> Tensors:
    return {".weight_packed": weight.codes, ".weight_scale": weight.scales.view(torch.uint8)}


def _pairs_and_factor(weight: QuantisedWeight) -> Tensors:
    assert weight.global_scale is not None
    factor = weight.global_scale.reciprocal().reshape(1)
    return {".weight_packed": weight.codes, ".weight_scale": weight.scales, ".weight_global_scale": factor}


def _by_group(weight_format: WeightFormat) -> Mapping[str, Any]:
    return {"strategy": "group", "group_size": weight_format.block[1]}


COMPRESSED = {
    "fp8": CompressedForm(
        "float-quantized",
        _bytes,
        lambda weight_format: {"strategy": "block", "block_structure": list(weight_format.block)},
        8,
        "float",
    ),
    "int8": CompressedForm("pack-quantized", _words, lambda weight_format: {"strategy": "channel"}, 8, "int"),
    "int4": CompressedForm("pack-quantized", _words, _by_group, 4, "int"),
    "mxfp4": CompressedForm("mxfp4-pack-quantized", _pairs, _by_group, 4, "float"),
    "nvfp4": CompressedForm(
        "nvfp4-pack-quantized",
        _pairs_and_factor,
        lambda weight_format: {"strategy": "tensor_group", "group_size": weight_format.block[1]},
        4,
        "float",
    ),
}
"""By the names of :data:`~xpar.kernels.quantisation.NAMED_FORMATS`."""


@dataclass(frozen=True)
class WrittenForm:
    """What a quantised checkpoint is written as.

    Attributes:
        quantisation: the formats of experts and dense weights.
        published: the form of fp8 or of stacked experts in MXFP4, which need no compressed-tensors; or None.
    """

    quantisation: Quantisation
    published: PublishedForm | None

    def store(self, weight: QuantisedWeight, is_expert: bool) -> Tensors:
        """Return the tensors of a module by what follows its name."""
        if self.published is not None:
            return self.published.store(weight)
        name = self.quantisation.experts if is_expert else self.quantisation.dense
        assert name is not None
        return COMPRESSED[name].store(weight)

    def config(
        self, experts: WeightFormat, dense: WeightFormat | None, floats: Sequence[str]
    ) -> Mapping[str, Any]:
        """Return the ``quantization_config``; ``floats``: the modules with matrices that stay floats."""
        if self.published is not None:
            return self.published.config(experts, floats)
        first = COMPRESSED[self.quantisation.experts]
        if dense is None or (self.quantisation.dense == self.quantisation.experts and dense == experts):
            groups = {"group_0": first.group(experts, ["Linear"])}
        else:
            second = COMPRESSED[str(self.quantisation.dense)]
            groups = {"group_0": first.group(experts, [EXPERTS]), "group_1": second.group(dense, ["Linear"])}
        forms = {str(group["format"]) for group in groups.values()}
        return {
            "quant_method": "compressed-tensors",
            "format": forms.pop() if len(forms) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(floats),
            "kv_cache_scheme": None,
        }


def written_form(quantisation: Quantisation, stacked: bool) -> WrittenForm:
    """Choose the form of a checkpoint; ``stacked``: a layer's experts are one tensor, inputs first.

    Raises ValueError for formats that no published form of such experts has.
    """
    if stacked:
        if quantisation.experts != "mxfp4" or quantisation.dense is not None:
            raise ValueError(
                f"format {quantisation}: the experts are stacked in one tensor, whose only published form "
                "is mxfp4 without dense weights; choose --format mxfp4, or quantise at load with --quantize"
            )
        return WrittenForm(quantisation, FORMS["mxfp4"])
    only_fp8 = quantisation.experts == "fp8" and quantisation.dense in (None, "fp8")
    return WrittenForm(quantisation, FORMS["fp8"] if only_fp8 else None)
