"""What a quantization_config says about the inputs of quantised products."""

from collections.abc import Mapping
from typing import Any

from xpar.engine.config import StoredActivations
from xpar.kernels.quantised_weight import ActivationScheme

Config = Mapping[str, Any]
OF_BATCH = "one dynamic scale for all tokens of a batch"
STATIC = "one static scale a tensor, measured when the model was quantised, which is not used"


def of_fp8(config: Config, block: tuple[int, int] | None) -> StoredActivations:
    """Read ``activation_scheme`` of the methods ``fp8``, ``mxfp8`` and ``fbgemm_fp8``."""
    method = str(config.get("quant_method")).replace("_", "-")
    if method == "fbgemm-fp8":
        return StoredActivations(ActivationScheme(0))
    if method == "mxfp8":
        return _groups(32, True)
    said = config.get("activation_scheme", "dynamic" if block else None)
    if said == "static":
        return StoredActivations(None, STATIC)
    if said != "dynamic":
        return StoredActivations(None, f"activation_scheme={said!r} says nothing about them")
    if block is None or not block[1]:
        return StoredActivations(ActivationScheme(0), is_of_batch=True)
    return _groups(block[1], config.get("scale_fmt") == "ue8m0")


def of_group(group: Config) -> StoredActivations:
    """Read ``input_activations`` of a group of compressed-tensors."""
    inputs = group.get("input_activations")
    if not inputs:
        return StoredActivations()
    bits, kind = inputs.get("num_bits"), inputs.get("type")
    if (bits, kind) != (8, "float"):
        return StoredActivations(None, f"codes of {bits} bits ({kind}) for them are not computed here")
    if inputs.get("dynamic") is not True:
        return StoredActivations(None, STATIC)
    strategy = inputs.get("strategy")
    if strategy == "token":
        return StoredActivations(ActivationScheme(0))
    if strategy == "group":
        return _groups(int(inputs.get("group_size") or 0), False)
    if strategy == "tensor":
        return StoredActivations(ActivationScheme(0), is_of_batch=True)
    return StoredActivations(None, f"strategy={strategy!r} for them is not computed here")


def _groups(size: int, power_of_two: bool) -> StoredActivations:
    if size != 128:
        return StoredActivations(None, f"scales for {size} values of them are not computed here, 128 are")
    return StoredActivations(ActivationScheme(128, power_of_two))
