"""What is refused, and what contradicts itself: one line with the name and the remedy."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_cases import CASES
from safetensors.torch import save_file

from xpar.engine.checkpoint.reader import Checkpoint
from xpar.engine.checkpoint.tensor_file import CheckpointError
from xpar.engine.formats.quantised_checkpoint import open_checkpoint

MODULE = "model.layers.0.mlp.experts.3.down_proj"
NAME = f"{MODULE}.weight"
BY_NAME = {case.name: case for case in CASES}
Tensors = dict[str, torch.Tensor]


def write(path: Path, quantisation: Any, tensors: Tensors, module: str = MODULE) -> Checkpoint:
    config = {"model_type": "none", "dtype": "bfloat16", "quantization_config": quantisation}
    (path / "config.json").write_text(json.dumps(config))
    save_file({module + end: tensor for end, tensor in tensors.items()}, path / "model.safetensors")
    return open_checkpoint(path)


def made(name: str) -> tuple[dict[str, Any], Tensors]:
    case = BY_NAME[name]
    return json.loads(json.dumps(case.config)), case.make(torch.Generator().manual_seed(1))


REFUSED = {
    "bitsandbytes": ({"quant_method": "bitsandbytes"}, r"'bitsandbytes' is not read: .*use the model's fp8"),
    "hqq": ({"quant_method": "hqq"}, r"'hqq' is not read"),
    "torchao": ({"quant_method": "torchao"}, r"'torchao' is not read: its tensors are Python objects"),
    "gguf": ({"quant_method": "gguf"}, r"'gguf' is not read: llama.cpp runs those"),
    "unknown": ({"quant_method": "new"}, r"'new' is not read: it is not known; use"),
    "marlin": (
        {"quant_method": "gptq", "checkpoint_format": "marlin"},
        r"_format='marlin' is not read",
    ),
    "planar": (
        {"quant_method": "gptq", "checkpoint_format": "gptq_p"},
        r"gptq_p' is not read: it holds",
    ),
    "gemv": ({"quant_method": "awq", "version": "GEMV"}, r"version='gemv' is not read: it is not the gemm"),
    "auto-round": (
        {"quant_method": "auto-round", "packing_format": "auto_round:gguf"},
        r"packing_format='auto_round:gguf' is not read: auto_round:auto_gptq and auto_round:auto_awq are",
    ),
    "auto-round's other zero points": (
        {"quant_method": "auto-round", "packing_format": "auto_round:gptqmodel", "sym": False},
        r"packing_format='auto_round:gptqmodel' is not read",
    ),
    "e5m2": ({"quant_method": "fp8", "fmt": "e5m2"}, r"fmt='e5m2': only e4m3 is read"),
    "modelopt": (
        {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
        r"'W4A8_AWQ' of ModelOpt is not",
    ),
    "no object": ("fp8", r"quantization_config must be an object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_method_that_is_not_read(tmp_path: Path, name: str) -> None:
    config, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path, config, {".weight": torch.ones(2, 2)})


@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize("name", ["gptq-v1", "ct-int4-g32"])
def test_bits_that_are_not_read(tmp_path: Path, name: str, bits: int) -> None:
    config, tensors = made(name)
    if "config_groups" in config:
        config["config_groups"]["group_0"]["weights"] = {
            "num_bits": bits,
            "type": "int",
            "strategy": "channel",
        }
    checkpoint = write(tmp_path, {**config, "bits": bits}, tensors)
    with pytest.raises(CheckpointError, match=f"{MODULE}.* has codes of {bits} bits: 4 and 8 are read"):
        checkpoint.read(NAME)


SCALES = {
    "fp8-block": (".weight_scale_inv", (0.0, -1.0, float("nan"), float("inf"))),
    "fp8-block-bf16": (".weight_scale_inv", (0.0, float("nan"))),
    "ct-float-channel": (".weight_scale", (0.0, -0.5)),
    "ct-int4-g32": (".weight_scale", (0.0, -0.5)),
    "ct-nvfp4": (".weight_global_scale", (0.0, float("inf"))),
    "modelopt-nvfp4": (".weight_scale_2", (0.0, -1.0, float("nan"))),
    "gptq-v1": (".scales", (0.0, float("nan"), float("inf"))),
    "awq": (".scales", (0.0, float("nan"))),
}


@pytest.mark.parametrize("name, value", [(name, v) for name, (_, values) in SCALES.items() for v in values])
def test_a_scale_that_is_none_names_its_tensor(tmp_path: Path, name: str, value: float) -> None:
    config, tensors = made(name)
    suffix = SCALES[name][0]
    tensors[suffix].reshape(-1)[-1] = value
    checkpoint = write(tmp_path, config, tensors)
    rule = "finite and not 0" if name in ("gptq-v1", "awq") else "finite and above 0"
    with pytest.raises(CheckpointError, match=rf"{MODULE}{suffix} holds 1 scales of \d+ that are not {rule}"):
        checkpoint.read(NAME)
    if tensors[suffix].ndim == 2 and suffix != ".scales":
        checkpoint.read(NAME, rows=slice(0, 8))  # a slice is not asked for scales that it does not have


def test_an_e8m0_scale_of_255_is_none(tmp_path: Path) -> None:
    config, tensors = made("ct-mxfp4")
    tensors[".weight_scale"][7, 2] = 255
    with pytest.raises(CheckpointError, match=r"weight_scale holds 1 scales of 165 .* \(such as nan\)"):
        write(tmp_path, config, tensors).read(NAME)


LISTS = {
    "full path": ({"modules_to_not_convert": [MODULE]}, True),
    "last component": ({"modules_to_not_convert": ["down_proj"]}, True),
    "older key": ({"ignored_layers": ["model.layers.0"]}, True),
    "regex": ({"modules_to_not_convert": [r"model\.layers\.\d+\.mlp"]}, True),
    "beginning of a component": ({"modules_to_not_convert": ["down", "model.layers.0.mlp.exp"]}, False),
    "end of a component": ({"modules_to_not_convert": ["proj", "gate", "wn_proj"]}, False),
    "null": ({"modules_to_not_convert": [None]}, False),
    "no list": ({"modules_to_not_convert": None}, False),
}


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_exclusions_is_only_compared(tmp_path: Path, name: str) -> None:
    """The file decides; a list that excludes a module with scales is an error."""
    config, tensors = made("fp8-block")
    changes, is_excluded = LISTS[name]
    checkpoint = write(tmp_path, {**config, **changes}, tensors)
    if is_excluded:
        with pytest.raises(CheckpointError, match=rf"leaves {MODULE} unquantised, but the file has its"):
            checkpoint.read(NAME)
    else:
        checkpoint.read(NAME)


EXCLUSIONS: dict[str, Callable[[dict[str, Any]], object]] = {
    "ct-int4-g32": lambda c: c["ignore"].append(r"re:.*down_proj"),
    "ct-float-channel": lambda c: c["ignore"].append(MODULE),
    "modelopt-nvfp4": lambda c: c["ignore"].append("model*down*"),
    "gptq-v1": lambda c: c.update(dynamic={r"-:.*experts\.3": {}}),
    "awq": lambda c: c.update(modules_to_not_convert=["down_proj"]),
    "auto-round-gptq": lambda c: c.update(extra_config={MODULE: {"bits": 16}}),
    "auto-round-awq": lambda c: c.update(extra_config={r".*experts\.\d+\.down_proj": {"bits": 16}}),
}


@pytest.mark.parametrize("name", EXCLUSIONS)
def test_every_language_of_exclusions(tmp_path: Path, name: str) -> None:
    config, tensors = made(name)
    write(tmp_path, config, tensors).read(NAME)
    EXCLUSIONS[name](config)
    with pytest.raises(CheckpointError, match="unquantised, but the file has its scales"):
        write(tmp_path, config, tensors).read(NAME)


WRONG: dict[str, tuple[str, Callable[[dict[str, Any], Tensors], object], str]] = {
    "block": (
        "fp8-block",
        lambda c, t: c.update(weight_block_size=[64, 64]),
        r"scale_inv is \[3, 2\], a weight \[300, 200\] with blocks of 64 x 64 has \[5, 4\]",
    ),
    "no block": ("fp8-block", lambda c, t: c.pop("weight_block_size"), r"config.json gives no block"),
    "group": ("gptq-v1", lambda c, t: c.update(group_size=64), r"96 inputs in groups of 64 have 2"),
    "symmetric": (
        "gptq-v1",
        lambda c, t: c.update(sym=True),
        r"holds zero points 0 to 15, config.json says sym: true",
    ),
    "order": ("gptq-desc_act", lambda c, t: t[".g_idx"].fill_(3), r"g_idx names groups 3 to 3 of 3"),
    "shape": (
        "ct-int4-odd",
        lambda c, t: t[".weight_shape"].copy_(torch.tensor([33, 40])),
        r"weight_shape says \[33, 40\], its 4-bit words are",
    ),
    "dtype": (
        "ct-nvfp4",
        lambda c, t: t.update({".weight_scale": t[".weight_scale"].float()}),
        r"weight_scale is F32 \[33, 5\], its format needs F8_E4M3 \[33, 5\]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_config_of_other_weights(tmp_path: Path, name: str) -> None:
    case, change, message = WRONG[name]
    config, tensors = made(case)
    change(config, tensors)
    with pytest.raises(CheckpointError, match=message):
        write(tmp_path, config, tensors).read(NAME)


def test_codes_without_scales_are_refused_by_dtype(tmp_path: Path) -> None:
    from xpar.engine.architectures.mlp_weights import load_tensor

    checkpoint = write(
        tmp_path, {"quant_method": "fp8"}, {".weight": torch.ones(2, 3).to(torch.float8_e4m3fn)}
    )
    with pytest.raises(CheckpointError, match=rf"{NAME} is stored as F8_E4M3: quantised weights need scales"):
        load_tensor(checkpoint, NAME, (2, 3), torch.float32)


def test_floats_with_a_scale_beside_them_are_floats(tmp_path: Path) -> None:
    """As tools write them that simulate a format."""
    tensors = {".weight": torch.randn(4, 6), ".weight_scale": torch.ones(4, 1), ".k_scale": torch.ones(())}
    checkpoint = write(tmp_path, {"quant_method": "fp8"}, tensors)
    assert list(checkpoint.names()) == [NAME]
    assert torch.equal(checkpoint.read(NAME), tensors[".weight"]) and checkpoint.weight_format(NAME) is None


def test_long_lists_are_compiled_once(tmp_path: Path) -> None:
    """Thousands of patterns, of which some are no regex, for thousands of modules."""
    from xpar.engine.formats.schemes import schemes_of

    left_out = [*(f"model.layers.{n}.mlp.gate" for n in range(3000)), "a(b", "lm_head"]
    scheme_of = schemes_of({"quant_method": "fp8", "modules_to_not_convert": left_out})
    begin = time.process_time()
    assert all(scheme_of(f"model.layers.1.mlp.experts.{n}.gate_proj") for n in range(1000))
    assert time.process_time() - begin < 5  # seconds; compiled each time it would take a hundred
    assert scheme_of("model.layers.2999.mlp.gate") is None and scheme_of("x.a(b") is None
    assert scheme_of("lm_head") is None


WARNED = {
    "gptq-v2-that-says-v1": "GPTQ zero points are of the other version than config.json says",
    "gptq-v1": "GPTQ zero points of 15 are read as 0",
}


@pytest.mark.parametrize("name", WARNED)
def test_a_doubtful_file_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    config, tensors = made(name)
    both = {f"{module}{end}": t.clone() for module in ("a", "b") for end, t in tensors.items()}
    checkpoint = write(tmp_path, config, both, "")
    for module in ("a", "b", "a"):
        checkpoint.read(f"{module}.weight")
    assert [WARNED[name] in record.message for record in caplog.records] == [True]


def test_several_groups_in_one_file(tmp_path: Path) -> None:
    """fp8 attention beside int4 experts, chosen by regexes, and a class for the rest."""
    files = {"model.layers.0.self_attn.o_proj": "ct-float-block", MODULE: "ct-int4-g32", "head": "ct-nvfp4"}
    patterns = {"ct-float-block": r"re:.*self_attn.*", "ct-int4-g32": MODULE, "ct-nvfp4": "Linear"}
    groups, tensors, expected = {}, {}, {}
    for module, name in files.items():
        config, stored = made(name)
        groups[name] = {**config["config_groups"]["group_0"], "targets": [patterns[name]]}
        tensors |= {module + end: tensor for end, tensor in stored.items()}
        expected[f"{module}.weight"] = BY_NAME[name].decode(stored)
    # The class comes first, and must not win.
    ordered = {"ct-nvfp4": groups.pop("ct-nvfp4"), **groups}
    config = {"quant_method": "compressed-tensors", "config_groups": ordered, "ignore": ["lm_head"]}
    checkpoint = write(tmp_path, config, tensors, "")
    assert set(checkpoint.names()) == set(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(checkpoint.read(name), weight, rtol=2.4e-7, atol=0.0)
