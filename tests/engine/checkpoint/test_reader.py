"""The reader gives what the safetensors library gives, counts its bytes, and names what is broken."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from xpar.engine.checkpoint.reader import Checkpoint, CheckpointError
from xpar.engine.checkpoint.tensor_file import DTYPES
from xpar.engine.checkpoint.tensor_writer import TensorPlan, write_tensors

TENSORS = {
    "a": torch.randn(7, 5),
    "b": torch.randn(6, 10).bfloat16(),
    "c": torch.arange(12, dtype=torch.int64),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
    "cube": torch.randn(2, 3, 4).half(),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "none", "dtype": "bfloat16"}')
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


def header_bytes(path: Path) -> int:
    return 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]


def shard(path: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int) -> None:
    path.joinpath("config.json").write_text("{}")
    plans = [TensorPlan(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
    write_tensors(path, plans, lambda plan: tensors[plan.name], max_shard_bytes)


@pytest.mark.parametrize("name", TENSORS)
def test_whole_tensors(path: Path, name: str) -> None:
    with Checkpoint(path) as checkpoint:
        tensor = checkpoint.read(name, expect_shape=tuple(TENSORS[name].shape))
    assert tensor.dtype == TENSORS[name].dtype
    assert torch.equal(tensor, TENSORS[name])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_every_dtype_is_read_as_the_library_wrote_it(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, (3, 5)).to(dtype)
    (tmp_path / "config.json").write_text("{}")
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    read = Checkpoint(tmp_path).read("x", cols=slice(1, 4))
    assert read.dtype == dtype and torch.equal(read.float(), tensor[:, 1:4].float())


@pytest.mark.parametrize(
    "rows, cols",
    [
        (slice(2, 5), None),
        (None, slice(3, 7)),
        (slice(1, 6), slice(0, 1)),
        (slice(4, None), slice(None, 9)),
        (slice(3, 3), slice(2, 4)),
        (slice(0, 2), slice(0, 10)),
        (None, slice(4, 4)),
    ],
    ids=str,
)
def test_slices_read_their_own_bytes_only(path: Path, rows: slice | None, cols: slice | None) -> None:
    with Checkpoint(path) as checkpoint:
        tensor = checkpoint.read("b", rows=rows, cols=cols)
        read = checkpoint.bytes_read
    expected = TENSORS["b"][rows or slice(None), cols or slice(None)]
    assert torch.equal(tensor, expected)
    assert read == header_bytes(path / "model.safetensors") + expected.numel() * 2


def test_opening_reads_no_weights_and_closing_keeps_the_count(path: Path) -> None:
    checkpoint = Checkpoint(path)
    assert checkpoint.bytes_read == 0
    checkpoint.read("a")
    once = checkpoint.bytes_read
    checkpoint.read("a")
    assert checkpoint.bytes_read == once + TENSORS["a"].nbytes, "the header was read twice"
    count = checkpoint.bytes_read
    checkpoint.close()
    assert checkpoint.bytes_read == count
    checkpoint.close()
    assert checkpoint.bytes_read == count


def test_out_is_filled_and_converted(path: Path) -> None:
    buffer = torch.full((9, 10), 7.0)
    Checkpoint(path).read("b", rows=slice(1, 4), out=buffer[2:5])
    assert torch.equal(buffer[2:5], TENSORS["b"][1:4].float())
    assert (buffer[:2] == 7).all() and (buffer[5:] == 7).all()


def test_shards_are_opened_only_when_wanted(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(4, 4) for i in range(5)}
    shard(tmp_path, tensors, max_shard_bytes=2 * 64)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    (tmp_path / files[1]).unlink()
    checkpoint = Checkpoint(tmp_path)
    for name in ("t0", "t1", "t4"):
        assert torch.equal(checkpoint.read(name), tensors[name])
    assert checkpoint.bytes_read == 3 * 64 + sum(header_bytes(tmp_path / f) for f in (files[0], files[2]))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors: cannot be opened"):
        checkpoint.read("t2")


def test_written_files_are_valid_for_the_library(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    shard(tmp_path, TENSORS, max_shard_bytes=10**6)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[name], TENSORS[name]) for name in TENSORS)


def rewrite_header(path: Path, change: Callable[[dict], object]) -> None:
    file = path / "model.safetensors"
    data = file.read_bytes()
    header = json.loads(data[8 : header_bytes(file)])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[header_bytes(file) :])


def edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


BROKEN = {
    "no config": (lambda p: (p / "config.json").unlink(), r"config\.json: cannot be read \(No such file"),
    "config not JSON": (edit("config.json", lambda b: b[:-5]), r"config\.json: not valid JSON"),
    "config not an object": (edit("config.json", lambda b: b"[1]"), r"config\.json: holds a JSON list"),
    "no weights": (
        lambda p: (p / "model.safetensors").unlink(),
        r"neither model\.safetensors nor .*converted",
    ),
    "empty file": (
        edit("model.safetensors", lambda b: b""),
        r"model\.safetensors: corrupt: 0 bytes are too few",
    ),
    "header cut": (
        edit("model.safetensors", lambda b: b[:50]),
        r"corrupt: the header claims \d+ bytes, .* has 42 after",
    ),
    "data cut": (
        edit("model.safetensors", lambda b: b[:-9]),
        r"truncated: tensor \w+ ends at byte \d+, the file at",
    ),
    "header not JSON": (
        edit("model.safetensors", lambda b: b[:8] + b"!" + b[9:]),
        r"header is not a JSON object",
    ),
    "header not UTF-8": (edit("model.safetensors", lambda b: b[:8] + b"\xff" + b[9:]), r"not a JSON object"),
    "huge header": (edit("model.safetensors", lambda b: b"\xff" * 8 + b[8:]), r"the header claims 184467"),
    "no offsets": (
        lambda p: rewrite_header(p, lambda h: h["a"].pop("data_offsets")),
        r"entry of tensor a lacks dtype, shape or data_offsets",
    ),
    "negative offsets": (
        lambda p: rewrite_header(p, lambda h: h["a"].update(data_offsets=[8, 4])),
        r"tensor a has offsets \[8, 4\)",
    ),
    "size and shape differ": (
        lambda p: rewrite_header(p, lambda h: h["a"].update(shape=[7, 6])),
        r"tensor a: 140 bytes cannot hold F32 of shape \[7, 6\]",
    ),
    "unknown dtype": (
        lambda p: rewrite_header(p, lambda h: h["a"].update(dtype="F4")),
        r"tensor a has unknown dtype F4; known: F64",
    ),
    "tensor missing": (
        lambda p: rewrite_header(p, lambda h: h.pop("a")),
        r"has no tensor a; the checkpoint is incomplete, or model_type='none'",
    ),
}


@pytest.mark.parametrize("damage, message", BROKEN.values(), ids=BROKEN.keys())
def test_broken_checkpoints_are_named(path: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint(path).read("a")
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert error.value.__suppress_context__ or error.value.__context__ is None


BROKEN_INDEX = {
    "no weight_map": ({"metadata": {}}, r"index\.json: weight_map must map"),
    "file elsewhere": ({"weight_map": {"a": "../x.safetensors"}}, r"in the same folder"),
    "not in the index": ({"weight_map": {"b": "s.safetensors"}}, r"index\.json: has no tensor a"),
    "not in its shard": ({"weight_map": {"a": "s.safetensors"}}, r"s\.safetensors: has no tensor a"),
    "shard missing": ({"weight_map": {"a": "gone.safetensors"}}, r"gone\.safetensors: cannot be opened"),
}


@pytest.mark.parametrize("index, message", BROKEN_INDEX.values(), ids=BROKEN_INDEX.keys())
def test_broken_indexes_are_named(tmp_path: Path, index: dict, message: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"b": torch.zeros(2)}, tmp_path / "s.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path).read("a")


def test_file_that_shrinks_while_in_use(path: Path) -> None:
    checkpoint = Checkpoint(path)
    entry = checkpoint.entry("b")
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(entry.begin + 3)
    with pytest.raises(CheckpointError, match=r"shortened while in use"):
        checkpoint.read("b")


def test_wrong_shape_and_bad_slices(path: Path) -> None:
    checkpoint = Checkpoint(path)
    with pytest.raises(CheckpointError, match=r"tensor a has shape \[7, 5\], config.json implies \[5, 7\]"):
        checkpoint.read("a", expect_shape=(5, 7))
    for bad in (slice(0, 8), slice(-1, 3), slice(0, 4, 2), slice(4, 2)):
        with pytest.raises(ValueError, match=r"must have step 1 and lie within 0\.\.7"):
            checkpoint.read("a", rows=bad)
    with pytest.raises(ValueError, match=r"cannot be sliced"):
        checkpoint.read("c", cols=slice(0, 1))
    with pytest.raises(ValueError, match=r"out is \[7, 4\], must be contiguous and \[7, 5\]"):
        checkpoint.read("a", out=torch.empty(7, 4))


def test_not_a_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory; give the folder"):
        Checkpoint(tmp_path / "nothing")


@pytest.mark.parametrize(
    "config, expected", [({"dtype": "bfloat16"}, torch.bfloat16), ({"torch_dtype": "float16"}, torch.float16)]
)
def test_declared_dtype(path: Path, config: dict, expected: torch.dtype) -> None:
    (path / "config.json").write_text(json.dumps(config))
    assert Checkpoint(path).dtype == expected


def test_undeclared_dtype(path: Path) -> None:
    (path / "config.json").write_text('{"dtype": "int3"}')
    with pytest.raises(CheckpointError, match="dtype='int3' is not one of float32"):
        _ = Checkpoint(path).dtype


@pytest.mark.parametrize(
    "rows, cols",
    [(None, None), (slice(1, 3), None), (None, slice(1, 4)), (slice(2, 3), slice(0, 2)), (slice(1, 1), None)],
    ids=str,
)
def test_an_entry_of_the_first_dimension_is_read_alone(
    path: Path, rows: slice | None, cols: slice | None
) -> None:
    with Checkpoint(path) as checkpoint:
        tensor = checkpoint.read("cube", rows, cols, expect_shape=(2, 3, 4), index=1)
        read = checkpoint.bytes_read
    expected = TENSORS["cube"][1, rows or slice(None), cols or slice(None)]
    assert torch.equal(tensor, expected)
    assert read == header_bytes(path / "model.safetensors") + expected.numel() * 2


def test_columns_of_a_tensor_of_three_dimensions(path: Path) -> None:
    with Checkpoint(path) as checkpoint:
        tensor = checkpoint.read("cube", slice(0, 2), slice(1, 3))
        read = checkpoint.bytes_read
    assert torch.equal(tensor, TENSORS["cube"][:2, 1:3])
    assert read == header_bytes(path / "model.safetensors") + tensor.nbytes


def test_an_entry_may_be_a_vector(path: Path) -> None:
    assert torch.equal(Checkpoint(path).read("a", slice(2, 4), index=6), TENSORS["a"][6, 2:4])


@pytest.mark.parametrize("name, index", [("cube", 2), ("cube", -1), ("c", 0), ("scalar", 0)])
def test_an_entry_that_is_not_there(path: Path, name: str, index: int) -> None:
    with pytest.raises(ValueError, match=rf"tensor {name} of shape .* has no entry {index} "):
        Checkpoint(path).read(name, index=index)
