"""Quantised checkpoints decoded by the formulas of their formats, one index at a time, without xpar.

``floats_of`` is what every reader is compared with. It knows a module by its tensors, and takes from
config.json what they do not say.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Stored = Mapping[str, Tensor]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
AWQ = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output in nibble i of an AWQ word."""


def e4m3(codes: Tensor) -> Tensor:
    """Decode by sign, exponent and mantissa."""
    bits = codes.view(torch.uint8).int()
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).float()
    magnitude = torch.where(
        exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * torch.pow(2.0, exponent.float() - 7)
    )
    return torch.where(bits >= 128, -magnitude, magnitude)


def e8m0(codes: Tensor) -> Tensor:
    return torch.pow(2.0, codes.view(torch.uint8).double() - 127).float()


def scale(tensor: Tensor) -> Tensor:
    if tensor.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return e8m0(tensor)
    return e4m3(tensor) if tensor.dtype == torch.float8_e4m3fn else tensor.float()


def axes(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows)[:, None], torch.arange(cols)[None, :]


def pairs(codes: Tensor) -> Tensor:
    """[N, K] of e2m1 pairs [N, K / 2]."""
    n, k = axes(codes.shape[0], 2 * codes.shape[1])
    return E2M1[((codes.view(torch.uint8).int()[n, k // 2] >> (4 * (k % 2))) & 15).long()]


def of_bytes(stored: Stored, name: str, block: tuple[int, int] | None) -> Tensor:
    codes = stored[".weight"]
    values = codes.float() if codes.dtype == torch.int8 else e4m3(codes)
    s = scale(stored[name])
    n, k = axes(*values.shape)
    if s.numel() == 1:
        return values * s.reshape(())
    if s.ndim == 1 or s.shape == (values.shape[0], 1):
        height, width = 1, values.shape[1]
    else:
        assert block is not None
        height, width = block
    s = s.reshape(values.shape[0] if s.ndim == 1 else s.shape[0], -1)
    if ".weight_zero_point" in stored:
        zero = stored[".weight_zero_point"].float().reshape(s.shape)
        values = values - zero[n // height, k // width]
    return values * s[n // height, k // width]


def of_groups(stored: Stored, codes: str, name: str, group: int) -> Tensor:
    values = pairs(stored[codes])
    n, k = axes(*values.shape)
    return values * scale(stored[name])[n, k // group]


def of_packed(stored: Stored, bits: int, group: int | None) -> Tensor:
    rows, cols = (int(size) for size in stored[".weight_shape"])
    per, offset = 32 // bits, 1 << (bits - 1)
    n, k = axes(rows, cols)
    q = ((stored[".weight_packed"].long()[n, k // per] >> (bits * (k % per))) & (2 * offset - 1)) - offset
    j = k // (group or cols)
    if ".weight_g_idx" in stored and int(stored[".weight_g_idx"].min()) >= 0:
        j = stored[".weight_g_idx"].long()[k]
    if ".weight_zero_point" in stored:
        words = stored[".weight_zero_point"].long()[n // per, j]
        q = q - (((words >> (bits * (n % per))) & (2 * offset - 1)) - offset)
    return q.float() * stored[".weight_scale"].float()[n, j]


def of_gptq(stored: Stored, bits: int, plus_one: bool) -> Tensor:
    words, rows = stored[".qweight"].shape
    per, most = 32 // bits, (1 << bits) - 1
    n, k = axes(rows, words * per)
    q = (stored[".qweight"].long()[k // per, n] >> (bits * (k % per))) & most
    j = stored[".g_idx"].long()[k]
    z = (stored[".qzeros"].long()[j, n // per] >> (bits * (n % per))) & most
    z = (z + 1) & most if plus_one else z
    return (q - z).float() * stored[".scales"].float()[j, n]


def of_awq(stored: Stored, group: int) -> Tensor:
    cols, words = stored[".qweight"].shape
    n, k = axes(8 * words, cols)
    slot = torch.tensor([AWQ.index(j) for j in range(8)])[n % 8]
    q = (stored[".qweight"].long()[k, n // 8] >> (4 * slot)) & 15
    j = k // group
    z = (stored[".qzeros"].long()[j, n // 8] >> (4 * slot)) & 15
    return (q - z).float() * stored[".scales"].float()[j, n]


def of_blocks(stored: Stored) -> Tensor:
    """gpt-oss: [E, K, N], inputs first, as the float checkpoint has it."""
    blocks, scales = stored["_blocks"], e8m0(stored["_scales"])
    expert = [pairs(b.flatten(1)) * s.repeat_interleave(32, 1) for b, s in zip(blocks, scales, strict=True)]
    return torch.stack([e.T for e in expert]).contiguous()


def decode(stored: Stored, config: Mapping[str, Any]) -> Tensor:
    """The weight of the module whose tensors are ``stored``."""
    group = config.get("group_size")
    if "_blocks" in stored:
        return of_blocks(stored)
    if ".qweight" in stored:
        if config["quant_method"] == "awq" or "awq" in config.get("packing_format", ""):
            return of_awq(stored, config["group_size"])
        return of_gptq(stored, config["bits"], config.get("checkpoint_format") != "gptq_v2")
    codes = ".weight_packed" if ".weight_packed" in stored else ".weight"
    if ".weight_global_scale" in stored:
        return of_groups(stored, codes, ".weight_scale", 16) / stored[".weight_global_scale"].float()
    if ".weight_scale_2" in stored:
        return of_groups(stored, codes, ".weight_scale", 16) * stored[".weight_scale_2"].float()
    name = next(s for s in (".weight_scale_inv", ".weight_scale", ".scale") if s in stored)
    if stored[codes].dtype == torch.int32:
        weights = config["config_groups"]["group_0"]["weights"]
        return of_packed(stored, weights["num_bits"], weights.get("group_size"))
    if stored[codes].dtype in (torch.uint8, torch.int8) and stored[name].dtype in (
        torch.uint8,
        torch.float8_e8m0fnu,
    ):
        return of_groups(stored, codes, name, 32)
    block = config.get("weight_block_size")
    return of_bytes(stored, name, tuple(block) if block else group and (1, group))


MARKERS = re.compile(r"(\.weight_scale_inv|\.weight_scale|\.scale|\.qweight|_blocks)$")
COMPANIONS = re.compile(
    r"(\.weight(_scale_inv|_scale|_packed|_shape|_zero_point|_scale_2|_global_scale)?|\.scale|\.input_scale"
    r"|\.input_global_scale|\.qweight|\.qzeros|\.scales|\.g_idx|_blocks|_scales)$"
)


def floats_of(path: Path) -> dict[str, Tensor]:
    """The float32 tensors of the quantised checkpoint at ``path``, of one file."""
    tensors = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    modules = {MARKERS.sub("", name) for name in tensors if MARKERS.search(name)}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module = COMPANIONS.sub("", name)
        if module not in modules or not COMPANIONS.search(name):
            found[name] = tensor.float() if tensor.is_floating_point() else tensor
            continue
        stored = {
            other.removeprefix(module): value
            for other, value in tensors.items()
            if COMPANIONS.sub("", other) == module and COMPANIONS.search(other)
        }
        found[module if "_blocks" in stored else module + ".weight"] = decode(stored, config)
    return found


def write_floats(path: Path, out: Path, dtype: str = "float32") -> None:
    """Write the float checkpoint of the quantised one at ``path`` into ``out``, with its other files."""
    shutil.copytree(path, out, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (out / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    tensors = {name: x.contiguous() for name, x in floats_of(path).items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def edit_quantisation(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Let ``change`` edit the quantization_config at ``path``."""
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))
