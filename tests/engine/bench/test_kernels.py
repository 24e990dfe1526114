"""The search for tile tables, without a GPU: what is tried, what is chosen, and what the commands say where
none is."""

import json
import time
from dataclasses import replace
from subprocess import CompletedProcess

import pytest
import torch
from run_commands import run_commands

from xpar.engine.bench.kernels import tile_search
from xpar.engine.bench.kernels.checks import forms_of
from xpar.engine.bench.kernels.tile_candidates import candidates, get_value, parts, replace_value
from xpar.kernels.contracts import Activation, ExpertInput, ExpertSpec
from xpar.kernels.gpu.availability import use_table
from xpar.kernels.gpu.default_tables import TABLES, default_table, former_table
from xpar.kernels.gpu.experts import TritonExperts
from xpar.kernels.gpu.tile_tables import Machine, Table, Tiles, Vector, read_table, write_table

HOPPER = Machine(sms=132, capability=(9, 0))


def layer_kernel(experts: int = 16, lists: bool = False) -> TritonExperts:
    spec = ExpertSpec(experts, 64, 64, torch.bfloat16, Activation("silu"))
    kernel = TritonExperts(spec, machine=HOPPER)
    kernel.table = former_table(kernel.table) if lists else TABLES["hopper", 2]
    return kernel


def batch(tokens: int, k: int = 4) -> ExpertInput:
    ids = torch.arange(k, dtype=torch.int32).expand(tokens, k)
    return ExpertInput(torch.ones(tokens, 64, dtype=torch.bfloat16), ids, torch.ones(tokens, k))


def test_parts_follow_the_batch() -> None:
    kernel, heights = layer_kernel(lists=True), layer_kernel()
    vectors = ("dependent", "gate_up vector", "down vector")
    assert parts(kernel, batch(1)) == parts(heights, batch(1)) == vectors
    assert parts(heights, batch(2)) == ("vector_bytes", *vectors)
    assert parts(kernel, batch(16)) == ("limits", "dependent", "gate_up 0", "down 0")
    assert {"limits", "gate_up 2", "down 2"} <= set(parts(kernel, batch(4096)))
    assert parts(heights, batch(16)) == ("form height0", "dependent", "gate_up height0", "down height0")
    assert parts(heights, batch(4096)) == ("form height5", "dependent", "gate_up height5", "down height5")


def test_forms_of_a_height_are_new_and_lead_to_their_parts() -> None:
    kernel = layer_kernel()
    for number, height in enumerate(kernel.table.heights):
        found = candidates(kernel, f"form height{number}", 9)
        assert height.tiles not in found and None in found and len(set(found)) == len(found) >= 2
        for value in found:
            table = replace_value(kernel.table, f"form height{number}", value)
            assert get_value(table, f"form height{number}") == value
            assert table.heights[:number] == kernel.table.heights[:number]
            assert Table.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    many = [v for v in candidates(kernel, "form height5", 9) if isinstance(v, Tiles)]
    assert any(v.gathered for v in many) and any(v.tall for v in many)


def test_candidates_are_new_fit_and_differ() -> None:
    kernel = layer_kernel()
    for part in (
        "gate_up vector",
        "down vector",
        *(f"{s} {b}" for s in ("gate_up", "down") for b in range(3)),
        *(f"{s} height{n}" for s in ("gate_up", "down") for n in range(6)),
    ):
        few, many = candidates(kernel, part, 5), candidates(kernel, part, 30)
        assert len(few) == 5 and few == many[:5] and len(set(many)) == len(many)
        for value in many:
            assert value != get_value(kernel.table, part)
            assert get_value(replace_value(kernel.table, part, value), part) == value
    for field in ("tall", "dependent"):
        (other,) = candidates(kernel, field, 5)
        assert other != getattr(kernel.table, field)
        assert getattr(replace_value(kernel.table, field, other), field) == other
    assert candidates(kernel, "vector_bytes", 5) == [0, 1 << 40]
    assert replace_value(kernel.table, "vector_bytes", 0).vector_bytes == 0


class Pretended:
    """A kernel whose time and output depend on its table alone."""

    name = "pretended"
    machine = HOPPER

    def __init__(self, table: Table, wrong: Vector | None = None) -> None:
        self.spec, self.table, self.wrong = layer_kernel().spec, table, wrong

    def is_tiny(self, x: ExpertInput) -> bool:
        return True

    def compute(self, x: ExpertInput) -> torch.Tensor:
        return torch.full((2, 2), 2.0 if self.table.gate_up_vector == self.wrong else 1.0)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> None:
    """More columns are faster in gate-up, and slower in down."""

    def seconds(cell: tile_search.Cell, table: Table) -> float:
        return 1.0 - 0.02 * table.gate_up_vector.columns + 0.02 * table.down_vector.columns

    monkeypatch.setattr(tile_search.Cell, "seconds", seconds)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


def cells_of(kernel: Pretended) -> list[tile_search.Cell]:
    return [tile_search.Cell(name, kernel, [batch(m)]) for name, m in (("a", 1), ("b", 2))]  # type: ignore[arg-type]


def test_search_takes_the_fastest_right_value_of_each_part(times: None) -> None:
    table = layer_kernel().table
    notes: list[str] = []
    wide = max((v for v in candidates(layer_kernel(), "gate_up vector", 12)), key=lambda v: v.columns)
    cells = cells_of(Pretended(table))
    found = Table.from_dict(tile_search.search(cells, 12, notes.append, time.perf_counter() + 60)["table"])
    assert found.gate_up_vector.columns == wide.columns > table.gate_up_vector.columns
    assert found.down_vector.columns < table.down_vector.columns
    assert replace(found, gate_up_vector=table.gate_up_vector, down_vector=table.down_vector) == table

    cells = cells_of(Pretended(table, wrong=found.gate_up_vector))
    result = tile_search.search(cells, 12, notes.append, time.perf_counter() + 60)
    assert Table.from_dict(result["table"]).gate_up_vector != found.gate_up_vector
    assert any("left out: gate_up vector" in note and "relative error" in note for note in notes)
    json.dumps(result)


def test_where_rows_go_is_chosen_before_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of SOME is tried and wins only after the limits have brought rows there."""
    kernel = layer_kernel(lists=True)
    table = replace(kernel.table, limits=(0, 0))
    monkeypatch.setattr(
        Pretended, "layout", lambda self, *shape: self.table.layout(*shape, 16, shape[1]), raising=False
    )
    monkeypatch.setattr(Pretended, "is_tiny", lambda self, x: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def seconds(cell: tile_search.Cell, table: Table) -> float:
        return (0.5 if table.limits[1] >= 128 else 1.0) + 0.05 * table.down[1].per_sm

    monkeypatch.setattr(tile_search.Cell, "seconds", seconds)
    cells = [tile_search.Cell("a", Pretended(table), [batch(400)])]  # type: ignore[arg-type]
    assert "down 1" not in tile_search.group_by_part(cells)
    result = tile_search.search(cells, 12, lambda text: None, time.perf_counter() + 60)
    found = Table.from_dict(result["table"])
    assert found.limits[1] >= 128 and found.down[1].per_sm == 1


def test_search_after_its_deadline_changes_nothing(times: None) -> None:
    table, notes = layer_kernel().table, []
    result = tile_search.search(cells_of(Pretended(table)), 12, notes.append, time.perf_counter() - 1)
    assert Table.from_dict(result["table"]) == table
    assert any("too late" in note for note in notes)


def test_written_table_is_read_and_others_stay(tmp_path) -> None:
    path, table = tmp_path / "tiles.json", layer_kernel().table
    other = replace(table, vector_tokens=2)
    write_table(path, HOPPER, torch.bfloat16, table)
    write_table(path, replace(HOPPER, sms=114), torch.bfloat16, other)
    write_table(path, HOPPER, torch.bfloat16, replace(table, vector_tokens=3))
    assert read_table(path, HOPPER, torch.bfloat16) == replace(table, vector_tokens=3)
    assert read_table(path, replace(HOPPER, sms=114), torch.bfloat16) == other
    assert len(json.loads(path.read_text())) == 2
    earlier = [{**row, "table": {**row["table"], "fit_depth": True}} for row in json.loads(path.read_text())]
    path.write_text(json.dumps(earlier))  # names that tables had before are passed over
    kernel = layer_kernel()
    use_table(kernel, path)
    assert kernel.table.vector_tokens == 3
    kernel.machine = replace(HOPPER, sms=1)
    with pytest.raises(ValueError, match=r"no table for Machine.*measure one here with xpar tune"):
        use_table(kernel, path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a file of tile tables"):
        write_table(path, HOPPER, torch.bfloat16, table)


WRONG = {
    "bench kernels --compare torch,expected": "--compare expected: choose any of former, torch,",
    "bench kernels": "the GPU kernels cannot run here: torch sees no GPU here",
    "tune olmoe": "the GPU kernels cannot run here: torch sees no GPU here",
    "tune olmo": "shape 'olmo' is not known",
    "tune olmoe --ep 7": "--ep 7: must divide 64 experts",
    "tune olmoe --layer 1": "olmoe is no checkpoint; leave --layer out",
    "tune olmoe --tokens 0": "--tokens 0: must be at least 1",
}


@pytest.fixture(scope="module")
def said_without_a_gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CompletedProcess[str]]:
    folder, commands = tmp_path_factory.mktemp("wrong"), [words.split() for words in WRONG]
    return dict(zip(WRONG, run_commands(1, commands, folder, env={"CUDA_VISIBLE_DEVICES": ""}), strict=True))


@pytest.mark.parametrize("words", WRONG)
def test_without_a_gpu_commands_say_so(
    said_without_a_gpu: dict[str, CompletedProcess[str]], words: str
) -> None:
    job = said_without_a_gpu[words]
    assert job.returncode == 1
    assert WRONG[words] in job.stderr and "Traceback" not in job.stderr


def test_checks_compute_a_batch_in_every_form() -> None:
    forms = forms_of(HOPPER)
    assert forms.pop("lists") == former_table(TABLES["hopper", 2])
    tiles = [form.heights[0].tiles for form in forms.values()]
    for width in (64, 4096):
        assert {height.tiles for height in default_table(HOPPER, torch.bfloat16, width).heights} < set(tiles)
    assert any(t is not None and t.gathered for t in tiles)
