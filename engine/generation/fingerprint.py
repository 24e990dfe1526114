"""Digests of the files of a checkpoint that decide answers; another model in the same place has others.

Weights are many gigabytes, so files above a limit are sampled: their header, which names every tensor, and
some bytes of each tensor. A model that was trained on, merged or quantised differs in nearly all of them.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.comm.partition import split_range
from xpar.engine.checkpoint.reader import INDEX_FILE, Checkpoint
from xpar.engine.checkpoint.tensor_file import TensorFile
from xpar.engine.generation.settings import DIGITS

WHOLE_BYTES = 64 * 2**20
"""Files up to this size are read in whole."""
SAMPLE_BYTES = 4096
"""Bytes of each sample; a tensor of up to eight times as many is read in whole."""
SAMPLES = (0.0, 0.5, 1.0)
"""The places of samples in a tensor, as parts of its length; rows for new tokens are at its end."""
BLOCK_BYTES = 2**20

TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map*",
    "added_tokens*",
    "*.model",
    "*.tiktoken",
)
TEMPLATES = ("chat_template*", "additional_chat_templates/*")
UNIMPORTANT = frozenset({"transformers_version", "_name_or_path", "torch_dtype", "dtype"})
"""Keys of configurations that say who wrote them; the dtype of the computation is a setting of its own."""


def fingerprint(comm: Communicator, path: Path) -> dict[str, str]:
    """Return part of the folder ``path`` -> digest, the same on every rank, without missing parts.

    Collective: each rank reads some of the weight files. One error on every rank if it is no checkpoint.
    """
    with agreed(comm, lambda: Checkpoint(path)) as checkpoint:
        files = checkpoint.weight_files()
        part = split_range(len(files), comm.size, comm.rank)
        mine = agreed(comm, lambda: [_weight_digest(path / name) for name in files[part]], patient=True)
        digests = [digest for digests in comm.all_gather_object(mine) for digest in digests]
        weights = [*zip(files, digests, strict=True)]
        own = agreed(comm, lambda: {"weights": _digest_of(weights), **_small_parts(path, checkpoint.config)})
    # Where folders of nodes differ, that of rank 0 counts, which writes the answers.
    return dict(comm.all_gather_object(own)[0])


def _small_parts(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    parts = {"config": _digest_of(_important(config))}
    index = path / INDEX_FILE
    if index.exists():
        parts["weight-map"] = _digest_of(json.loads(index.read_bytes()).get("weight_map"))
    for name, patterns in (("tokenizer", TOKENIZER), ("chat-template", TEMPLATES)):
        files = sorted({file for pattern in patterns for file in path.glob(pattern) if file.is_file()})
        if files:
            parts[name] = _digest_of([(file.name, _file_digest(file)) for file in files])
    generation = path / "generation_config.json"
    if generation.exists():
        parts["generation-config"] = _config_digest(generation)
    return parts


def _config_digest(path: Path) -> str:
    """Digest what a JSON file says, not how it is written; its bytes where it is no JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        value = None
    return _digest_of(_important(value)) if isinstance(value, dict) else _file_digest(path)


def _important(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in UNIMPORTANT}


def _weight_digest(path: Path) -> str:
    """Digest size, header and data of a safetensors file, or samples of the data."""
    file = TensorFile(path)  # says what is wrong with one that cannot be opened
    try:
        size = path.stat().st_size
        if size <= WHOLE_BYTES:
            return _file_digest(path)
        entries = sorted((entry.begin, entry.end) for entry in file.entries.values())
    finally:
        file.close()
    header = min((begin for begin, _ in entries), default=size)
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb", buffering=0) as data:
        for begin, end in [(0, header), *_samples(entries)]:
            digest.update(os.pread(data.fileno(), end - begin, begin))
    return digest.hexdigest()


def _samples(entries: Iterable[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    """Yield places of the bytes of each tensor that are read."""
    for begin, end in entries:
        if end - begin <= 8 * SAMPLE_BYTES:
            yield begin, end
            continue
        for place in SAMPLES:
            start = begin + int(place * (end - begin - SAMPLE_BYTES))
            yield start, start + SAMPLE_BYTES


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _digest_of(value: object) -> str:
    return "#" + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:DIGITS]
