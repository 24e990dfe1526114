"""The formats by the tensors that they store, and where a checkpoint says which it is."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from xpar.engine.checkpoint.reader import Checkpoint, read_json
from xpar.engine.checkpoint.tensor_file import CheckpointError
from xpar.engine.formats.awq import AwqWeight
from xpar.engine.formats.fp8 import SCALES, ByteWeight
from xpar.engine.formats.gptq import GptqWeight
from xpar.engine.formats.mxfp4 import Blocks, NibblePairs
from xpar.engine.formats.nvfp4 import Nvfp4Weight
from xpar.engine.formats.packed_int import PackedInt
from xpar.engine.formats.stored_weight import Parts, Scheme, StoredWeight

MARKERS = {
    **dict.fromkeys((*SCALES, ".weight_packed", ".qweight"), ".weight"),
    "_blocks": "",
}
"""The end of the name of a tensor that only quantised modules have -> that of the float weight."""
COMPANIONS = (
    *SCALES,
    *(".weight_packed", ".weight_shape", ".weight_zero_point", ".weight_g_idx", ".weight_scale_2"),
    *(
        ".weight_global_scale",
        ".input_scale",
        ".input_zero_point",
        ".input_global_scale",
        ".activation_scale",
    ),
    *(".output_scale", ".qweight", ".qzeros", ".scales", ".g_idx", "_blocks", "_scales"),
)
"""The ends of the names of tensors that stand beside a quantised weight, or in its place."""
CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale")
"""The ends of the names of scales of attention caches, which are not quantised here."""
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
OTHER_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files beside config.json in which older tools described the quantisation -> their method."""


def quantisation_of(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """Return the description of how ``checkpoint`` is quantised; None if nothing says that it is."""
    inner = checkpoint.config.get("text_config")
    for config in (checkpoint.config, inner if isinstance(inner, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if (found := config.get(key)) is not None:
                if not isinstance(found, Mapping):
                    raise CheckpointError(f"{checkpoint.path / 'config.json'}: {key} must be an object")
                return found if found.get("quant_method") else {"quant_method": _guess(found), **found}
    for name, method in OTHER_FILES.items():
        if (checkpoint.path / name).is_file():
            return {"quant_method": method, **read_json(checkpoint.path / name)}
    return None


def _guess(config: Mapping[str, Any]) -> str | None:
    return (
        "modelopt" if "quant_algo" in config else "compressed-tensors" if "config_groups" in config else None
    )


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``config.json`` of the same model in floats."""
    kept = {k: v for k, v in config.items() if k not in ("quantization_config", "compression_config")}
    if isinstance(inner := kept.get("text_config"), Mapping):
        kept["text_config"] = without_quantisation(inner)
    return kept


def find_modules(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (module, name of its float weight) of every module that a marker stands for.

    Scales stand for a module only where a weight is beside them: parameters of other modules may be called
    scale.
    """
    for name in names:
        for marker, suffix in MARKERS.items():
            module = name.removesuffix(marker)
            if name.endswith(marker) and module and (marker not in SCALES or module + ".weight" in names):
                yield module, module + suffix


def make_weight(parts: Parts, scheme: Scheme) -> StoredWeight | None:
    """Find the format of a module by its tensors; None for floats that have a scale beside them."""
    if parts.has("_blocks"):
        return Blocks(parts, scheme)
    if parts.has(".qweight"):
        return (AwqWeight if scheme.packing == "awq" else GptqWeight)(parts, scheme)
    if parts.has(".weight_packed"):
        if parts.dtype(".weight_packed") == "I32":
            return PackedInt(parts, scheme)
        return (Nvfp4Weight if parts.has(".weight_global_scale") else NibblePairs)(parts, scheme)
    stored = parts.dtype(".weight")
    if stored in FLOATS:
        return None
    if parts.has(".weight_scale_2") and stored == "U8":
        return Nvfp4Weight(parts, scheme)
    scale = next(suffix for suffix in SCALES if parts.has(suffix))
    if stored in ("U8", "I8") and parts.dtype(scale) in ("F8_E8M0", "U8"):
        return NibblePairs(parts, scheme)
    return ByteWeight(parts, scheme)
