"""Contenders in turn, and those of other packages, without a GPU: stand-ins for clocks and packages."""

import argparse
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from xpar.engine.bench.gpu_turns import Card, Turns, parse_card, take_bursts
from xpar.engine.bench.kernels import measure
from xpar.engine.bench.kernels.cases import LayerCase, Weights, random_input, random_weights
from xpar.engine.bench.kernels.cell_report import cell_row, expand_names, format_cell, times_table
from xpar.engine.bench.kernels.contenders import former_experts, torch_grouped
from xpar.engine.bench.kernels.installed_products import PACKAGES, find_installed
from xpar.kernels import reference
from xpar.kernels.contracts import Activation, ExpertInput
from xpar.kernels.gpu.experts import TritonExperts
from xpar.kernels.gpu.tile_tables import Machine

LAYER = LayerCase("small", hidden=24, width=16, experts=6, top_k=2, of=6)


def test_every_round_begins_with_another_contender_and_a_slow_round_cancels() -> None:
    """A card that grows slower from burst to burst, and waits longer in one round."""
    order: list[str] = []

    def burst(name: str, seconds: float) -> float:
        order.append(name)
        return seconds * (1 + 0.001 * len(order)) * (3 if 9 <= len(order) < 12 else 1)

    contenders = {"a": partial(burst, "a", 1.0), "b": partial(burst, "b", 2.0), "c": partial(burst, "c", 1.5)}
    turns = take_bursts(contenders, 6)
    assert [order[i] for i in range(0, 21, 3)] == ["c", "a", "b", "c", "a", "b", "c"]
    assert sorted(order) == sorted("abc" * 7)  # one round is not counted
    assert {name: len(times) for name, times in turns.seconds.items()} == {"a": 6, "b": 6, "c": 6}
    assert turns.ratio("b", "a") == pytest.approx(2.0, rel=0.01)
    assert turns.ratio("c", "a") == pytest.approx(1.5, rel=0.01)
    assert (
        turns.fastest(()) == "a" and turns.fastest(("a",)) == "c" and turns.fastest(("a", "b", "c")) is None
    )


def test_the_card_is_read_during_the_last_round() -> None:
    events: list[str] = []

    def read() -> Any:
        events.append("begin")
        return lambda: events.append("end") or Card(1410.0, 698.5)

    turns = take_bursts({"a": lambda: events.append("a") or 1.0}, 2, read)
    assert events == ["a", "a", "begin", "a", "end"] and turns.card == Card(1410.0, 698.5)


def test_lines_of_the_card_are_parsed() -> None:
    assert parse_card("1980, 450.12\n") == Card(1980.0, 450.12)
    for wrong in ("", "[N/A], 450", "1, 2, 3", "No devices were found"):
        assert parse_card(wrong) is None


def test_a_cell_names_the_fastest_peer_but_never_xpar_itself() -> None:
    seconds = {"xpar": (2.0, 2.2), "former": (1.0, 1.0), "torch": (4.0, 4.4), "vllm": (1.9, 2.09)}
    row = cell_row(Turns(seconds, Card(1500.0, 700.0)), 2)
    assert row["xpar graph"] == pytest.approx(1.05) and row["torch ratio"] == pytest.approx(2.0)
    assert row["fastest"] == "vllm" and row["fastest ratio"] == pytest.approx(0.95)
    assert "vllm ratio 0.950" in format_cell(row) and "1500 MHz, 700 W" in format_cell(row)
    shown = times_table([{"model": "olmoe", "tokens": 4, **row}])
    assert list(shown.columns[6].cells) == ["vllm 0.95"]
    assert "fastest" not in cell_row(Turns({"xpar": (1.0,), "former": (2.0,)}), 1)


def test_names_of_contenders() -> None:
    assert expand_names("former,torch,installed", ("vllm", "torch")) == ["former", "torch", "vllm"]
    assert expand_names("", ("vllm",)) == []


def test_packages_are_found_by_all_that_they_need() -> None:
    have = {"triton_kernels", "deep_gemm"}
    assert set(find_installed(lambda name: name in have or None)) == {"deep_gemm"}
    assert set(find_installed(lambda name: True)) == set(PACKAGES)
    assert find_installed(lambda name: None) == {}


def stand_in_modules() -> dict[str, ModuleType]:
    """Packages whose functions compute on the host what the real ones compute from such arguments."""

    def fused(
        x: Any, w1: Any, w2: Any, weights: Any, ids: Any, inplace: bool = False, activation: str = "silu"
    ):
        assert not inplace and activation == "silu"
        return reference.routed_experts(x, ids, weights, w1, w2, Activation("silu")).to(x.dtype)

    def masked(rows: Any, weight: Any, out: Any, counts: Any, expected: int) -> None:
        assert counts.dtype == torch.int32 and isinstance(expected, int)
        for e, count in enumerate(counts.tolist()):
            out[e, :count] = rows[e, :count] @ weight[e].T
            out[e, count:] = float("nan")

    def make_routing_data(ids: Any, weights: Any, experts: int) -> tuple[Any, Any, Any]:
        return SimpleNamespace(ids=ids, gate_scal=weights), "gather", "scatter"

    def matmul_ogs(x: Any, w: Any, bias: Any, routing: Any, **options: Any) -> Any:
        k = routing.ids.shape[1]
        flat = routing.ids.reshape(-1).long()
        rows = x.repeat_interleave(k, 0) if "gather_indx" in options else x
        y = torch.einsum("sh,shn->sn", rows, w[flat])
        if "scatter_indx" not in options:
            return y
        return (y.view(-1, k, y.shape[1]) * options["gammas"][..., None]).sum(1)

    routed = "vllm.model_executor.layers.fused_moe.gpt_oss_triton_kernels_moe"
    functions = {
        "vllm.model_executor.layers.fused_moe": {"fused_experts": fused},
        routed: {"make_routing_data": make_routing_data},
        "sglang.srt.layers.moe.fused_moe_triton.fused_moe": {"fused_experts_impl": fused},
        "triton_kernels.matmul_ogs": {"matmul_ogs": matmul_ogs},
        "deep_gemm": {"m_grouped_bf16_gemm_nt_masked": masked},
    }
    modules = {}
    for path, members in functions.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        vars(modules[path]).update(members)
    return modules


def case(g: torch.Generator, tokens: int) -> tuple[LayerCase, Any, Weights, ExpertInput, torch.Tensor]:
    spec = LAYER.spec(torch.float32, "cpu")
    weights = random_weights(spec, g)
    x = random_input(spec, tokens, LAYER.top_k, LAYER.of, g)
    expected = reference.routed_experts(
        x.hidden_states, x.topk_ids, x.topk_weights, weights.gate_up, weights.down, spec.activation
    )
    return LAYER, spec, weights, x, expected


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("name", PACKAGES)
def test_contenders_of_packages_compute_the_layer(
    name: str, tokens: int, fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path, module in stand_in_modules().items():
        monkeypatch.setitem(sys.modules, path, module)
    _, spec, weights, x, expected = case(torch.Generator().manual_seed(fresh_seed), tokens)
    compute = PACKAGES[name][1](spec, weights, False)
    assert torch.allclose(compute(x), expected, atol=1e-5)
    with pytest.raises(ValueError, match="no biases, no slots of other ranks"):
        PACKAGES[name][1](spec, weights, True)
    with pytest.raises(ValueError, match="no activation but SiLU"):
        PACKAGES[name][1](replace(spec, activation=Activation("gelu")), weights, False)


class Bench:
    """A run that keeps what it was told."""

    def __init__(self, compare: str) -> None:
        self.args, self.said, self.failures = argparse.Namespace(compare=compare), [], []  # type: ignore[var-annotated]

    def say(self, text: str) -> None:
        self.said.append(text)

    def attempt(self, name: str, action: Any) -> Any:
        try:
            return action()
        except AssertionError as why:
            self.failures.append(f"{name}: {why}")
            return None


def test_contenders_that_compute_another_layer_are_not_timed(
    fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, spec, weights, x, expected = case(torch.Generator().manual_seed(fresh_seed), 5)
    kernel = SimpleNamespace(spec=spec, compute=lambda x: expected, table=None)

    def wrong(*_: Any) -> Any:
        return lambda x: expected * 1.5

    def missing(*_: Any) -> Any:
        raise ImportError("no such package")

    monkeypatch.setattr(measure, "CONTENDERS", {"torch": torch_grouped, "wrong": wrong})
    monkeypatch.setattr(measure, "find_installed", lambda: {"missing": missing})
    monkeypatch.setattr(measure, "former_experts", lambda kernel: SimpleNamespace(compute=lambda x: expected))
    monkeypatch.setattr(measure, "PACKAGES", {"absent": ((), missing)})
    bench: Any = Bench("former,wrong,absent,installed")
    found = measure._build_contenders(bench, "cell", layer, kernel, weights)  # type: ignore[arg-type]
    assert list(found) == ["xpar", "former", "wrong"]
    assert bench.said == [f"cell: without {name}: no such package" for name in ("absent", "missing")]
    same = measure._find_same(bench, "cell", kernel, found, x)  # type: ignore[arg-type]
    assert list(same) == ["xpar", "former"]
    assert len(bench.failures) == 1 and "wrong computes the same" in bench.failures[0]


def test_former_choices_leave_the_kernel_as_it_is() -> None:
    kernel = TritonExperts(LAYER.spec(torch.bfloat16, "cpu"), machine=Machine(132, (9, 0)))
    former = former_experts(kernel)
    assert kernel.table.heights and not former.table.heights and former.table.ranked_slots == 0
    assert former._gate_up is kernel._gate_up
    assert former.layout(1024, 8192).height is None and kernel.layout(1024, 8192).height is not None
