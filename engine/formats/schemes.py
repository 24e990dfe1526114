"""The schemes that a quantization_config gives to modules: one function for each ``quant_method``.

Such a function takes the configuration and makes a function of a module's name; that returns the module's
scheme, or None for a module that the configuration leaves unquantised.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from xpar.engine.checkpoint.tensor_file import CheckpointError
from xpar.engine.formats import activations
from xpar.engine.formats.patterns import globs, path_or_end, targets
from xpar.engine.formats.stored_weight import Scheme

Config = Mapping[str, Any]
SchemeOf = Callable[[str], Scheme | None]
REFUSED = {
    "bitsandbytes": "its 4-bit and 8-bit layers are not how any mixture of experts is published",
    "hqq": "it has no fixed form in a file",
    "torchao": "its tensors are Python objects",
    "gguf": "llama.cpp runs those files",
    "quark": "its layouts differ from file to file",
    "aqlm": "its codebooks are not read",
    "vptq": "its codebooks are not read",
    "eetq": "its layout is that of one GPU library",
    "spqr": "its sparse parts are not read",
    "higgs": "its codebooks are not read",
    "bitnet": "its ternary codes are not read",
}
"""Methods that are not read, and why."""
INSTEAD = "use the model's fp8, MXFP4, compressed-tensors, GPTQ, AWQ or NVFP4 release, or the one in bfloat16"
PACKINGS = {
    "marlin": "holds words in the order of one GPU kernel",
    "gptq_p": "holds bits in planes",
    "bitblas": "holds words in the order of one GPU kernel",
    "gemv": "is not the gemm layout",
    "gemv_fast": "is not the gemm layout",
    "llm-awq": "is not the gemm layout",
    "ipex": "is not the gemm layout",
}
"""Layouts of GPTQ and AWQ that are not read, and why."""


AUTO_ROUND = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
"""AutoRound's own names of the two packings."""


def schemes_of(config: Config) -> SchemeOf:
    """Choose the reader of ``config``; CheckpointError, with what to use instead, for one that is refused."""
    method = str(config.get("quant_method") or "").lower().replace("_", "-")
    if method in METHODS:
        return METHODS[method](config)
    name = next((refused for refused in REFUSED if method.startswith(refused)), None)
    why = "it is not known" if name is None else REFUSED[name]
    raise CheckpointError(
        f"config.json: quantization_config.quant_method={config.get('quant_method')!r} is not read: {why}; "
        f"{INSTEAD}"
    )


def _fp8(config: Config) -> SchemeOf:
    block = _pair(config.get("weight_block_size"))
    if config.get("quant_method") == "mxfp8":
        block = block or (1, 32)
    fmt = str(config.get("fmt") or "e4m3")
    if "e5m2" in fmt:
        raise CheckpointError(f"config.json: quantization_config.fmt={fmt!r}: only e4m3 is read; {INSTEAD}")
    inputs = activations.of_fp8(config, block)
    scheme = Scheme(str(config.get("quant_method")), 8, block, activations=inputs)
    is_left_out = path_or_end([*_list(config, "modules_to_not_convert"), *_list(config, "ignored_layers")])
    return lambda module: None if is_left_out(module) else scheme


def _mxfp4(config: Config) -> SchemeOf:
    scheme = Scheme("mxfp4", 4, (1, 32))
    left_out = _list(config, "modules_to_not_convert")
    is_path, is_glob = path_or_end(left_out), globs(left_out)
    return lambda module: None if is_path(module) or is_glob(module) else scheme


def _compressed_tensors(config: Config) -> SchemeOf:
    """Resolve a module's group: an exact name before a regex, that before a class; ``ignore`` before all."""
    is_ignored = targets(_list(config, "ignore"))
    groups = [group for group in (config.get("config_groups") or {}).values() if isinstance(group, Mapping)]
    wanted = [(str(t), _group_scheme(g)) for g in groups for t in g.get("targets") or ()]
    names = {name: scheme for name, scheme in wanted if not name.startswith("re:") and "." in name}
    regexes = [(targets([name]), scheme) for name, scheme in wanted if name.startswith("re:")]
    classes = [scheme for name, scheme in wanted if not name.startswith("re:") and "." not in name]

    def scheme_of(module: str) -> Scheme | None:
        if is_ignored(module):
            return None
        if module in names:
            return names[module]
        matching = (scheme for is_target, scheme in regexes if is_target(module))
        return next(matching, classes[0] if classes else None)

    return scheme_of


def _group_scheme(group: Config) -> Scheme:
    weights = group.get("weights") or {}
    size, strategy = weights.get("group_size"), str(weights.get("strategy") or "tensor")
    block = {
        "tensor": (0, 0),
        "channel": (1, 0),
        "group": (1, int(size or 0)),
        "tensor_group": (1, int(size or 0)),
        "block": _pair(weights.get("block_structure")),
    }
    if strategy not in block:
        raise CheckpointError(
            f"config.json: config_groups: strategy={strategy!r} is not one of {', '.join(block)}; {INSTEAD}"
        )
    bits, symmetric = weights.get("num_bits"), bool(weights.get("symmetric", True))
    inputs = activations.of_group(group)
    return Scheme("compressed-tensors", bits, block[strategy], symmetric, activations=inputs)


def _gptq(config: Config) -> SchemeOf:
    dynamic: Mapping[str, Any] = config.get("dynamic") or {}
    _refuse_packing(config.get("checkpoint_format"), "checkpoint_format")
    if config.get("is_marlin_format"):
        _refuse_packing("marlin", "checkpoint_format")

    def scheme_of(module: str) -> Scheme | None:
        for pattern, changes in dynamic.items():
            text = pattern.removeprefix("+:").removeprefix("-:")
            if re.match(text, module):
                if pattern.startswith("-:"):
                    return None
                return _integer_scheme({**config, **(changes or {})}, "gptq", "gptq")
        return _integer_scheme(config, "gptq", "gptq")

    return scheme_of


def _awq(config: Config) -> SchemeOf:
    for key in ("version", "format"):
        _refuse_packing(str(config.get(key) or "gemm").lower(), key)
    scheme = _integer_scheme(config, "awq", "awq")
    is_left_out = path_or_end(_list(config, "modules_to_not_convert"))
    return lambda module: None if is_left_out(module) else scheme


def _auto_round(config: Config) -> SchemeOf:
    packing = str(config.get("packing_format") or "auto_round:auto_gptq")
    kind = AUTO_ROUND.get(packing)
    if packing == "auto_round:gptqmodel" and config.get("sym"):
        kind = "gptq"  # zero points of symmetric files say themselves how they are stored
    if kind is None:
        raise CheckpointError(
            f"config.json: quantization_config.packing_format={packing!r} is not read: auto_round:auto_gptq "
            f"and auto_round:auto_awq are; {INSTEAD}"
        )
    extra: Mapping[str, Any] = config.get("extra_config") or {}
    regexes = [(targets([f"re:(?:{name})$"]), name) for name in extra if re.search(r"[^\w.\-]", name)]

    def scheme_of(module: str) -> Scheme | None:
        matching = (extra[name] for is_match, name in regexes if is_match(module))
        changes: Mapping[str, Any] = extra.get(module) or next(matching, None) or {}
        if int(changes.get("bits") or config.get("bits") or 4) >= 16:
            return None
        return _integer_scheme({**config, **changes}, "auto-round", kind)

    return scheme_of


def _modelopt(config: Config) -> SchemeOf:
    """Read either place of ModelOpt's configuration; the file's dtypes tell NVFP4 and fp8 apart."""
    inner: Mapping[str, Any] = config.get("quantization") or config
    is_left_out = globs([*_list(inner, "exclude_modules"), *_list(inner, "ignore")])
    algorithm = str(inner.get("quant_algo") or "NVFP4").upper()
    known = ("NVFP4", "FP8", "W4A16_NVFP4", "MIXED_PRECISION", "FP8_PB_WO", "NVFP4_AWQ", "W4A8_NVFP4_FP8")
    if algorithm not in known:
        raise CheckpointError(
            f"quantization_config: quant_algo={algorithm!r} of ModelOpt is not one of {', '.join(known)}; "
            f"{INSTEAD}"
        )
    scheme = Scheme("modelopt", None, (128, 128) if algorithm == "FP8_PB_WO" else None)
    return lambda module: None if is_left_out(module) else scheme


def _integer_scheme(config: Config, method: str, packing: str) -> Scheme:
    size = int(config.get("group_size") or 0)
    return Scheme(
        method,
        int(config.get("bits") or config.get("w_bit") or 4),
        None if not size else (1, max(size, 0)),
        bool(config.get("sym", False)),
        config.get("checkpoint_format") != "gptq_v2",
        packing,
        signed_scales=True,
    )


def _refuse_packing(name: object, key: str) -> None:
    if name in PACKINGS:
        raise CheckpointError(
            f"config.json: quantization_config.{key}={name!r} is not read: it {PACKINGS[str(name)]}; "
            f"{INSTEAD}"
        )


def _pair(value: Any) -> tuple[int, int] | None:
    return None if not value else (int(value[0]), int(value[1]))


def _list(config: Config, key: str) -> list[Any]:
    value = config.get(key)
    return value if isinstance(value, list) else []


METHODS: Mapping[str, Callable[[Config], SchemeOf]] = {
    "fp8": _fp8,
    "mxfp8": _fp8,
    "fbgemm-fp8": _fp8,
    "mxfp4": _mxfp4,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "auto-round": _auto_round,
    "modelopt": _modelopt,
    "modelopt-fp4": _modelopt,
}
"""The methods that are read, by ``quant_method``."""
