"""Route, compute and combine in one call of a kernel: the bits of the steps one by one, and only where that
is allowed."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from xpar.comm import ProcessGrid, RemoteRankError
from xpar.engine.config import LayerConfig, RouterConfig, SharedConfig
from xpar.engine.layer.build import build_layer
from xpar.engine.layer.micro_batches import MicroBatches
from xpar.engine.layer.observers import Observers
from xpar.engine.layer.options import Depth, LayerOptions
from xpar.engine.layer.route_and_compute import FusedRunner
from xpar.engine.layer.runner import MoERunner
from xpar.engine.layer.stage_timer import MeasuringTimer
from xpar.engine.routing import SimulatedLoadRule
from xpar.engine.synthetic.layer import SyntheticLayer
from xpar.kernels.contracts import Activation, ExpertSpec
from xpar.kernels.cpu.host import multiplies_bfloat16
from xpar.kernels.registry import KERNELS, KernelEntry

HIDDEN, WIDTH, EXPERTS, FEW = 64, 64, 9, 4
PLAIN = LayerConfig(EXPERTS, HIDDEN, WIDTH, RouterConfig(3))
COVERED = {
    "renormalised": PLAIN,
    "as scored": replace(PLAIN, router=RouterConfig(3, renormalize=False, routed_scaling_factor=2.5)),
    "of the chosen": replace(PLAIN, router=RouterConfig(3, choice="logits", renormalize=False)),
    "all of them": replace(PLAIN, router=RouterConfig(EXPERTS)),
    "float32 logits": replace(PLAIN, router=RouterConfig(2, logits_dtype="float32")),
    "shared beside": replace(PLAIN, shared=SharedConfig(WIDTH, gated=True)),
}
SPEC = ExpertSpec(EXPERTS, HIDDEN, WIDTH, torch.bfloat16, Activation("silu"))
RECORDS = [record for record in KERNELS if record.fused_routing is not None and record.why_not(SPEC) is None]


def layer_at(depth: Depth, config: LayerConfig, kernel: str = "onednn", seed: int = 0) -> MoERunner:
    layer = SyntheticLayer(config, torch.bfloat16, seed)
    options = LayerOptions(kernel=kernel, depth=depth)
    return build_layer(config, ProcessGrid.single(), torch.bfloat16, layer.read, options)


def tokens(count: int, seed: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed)).bfloat16()


def watch(runner: MoERunner, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every call of the kernel's that covers several steps add its number of tokens to ``calls``."""
    assert isinstance(runner, FusedRunner)
    kernel: Any = runner.kernel
    whole = kernel.route_and_compute

    def told(hidden_states: Tensor, *args: object) -> object:
        calls.append(hidden_states.shape[0])
        return whole(hidden_states, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel, "route_and_compute", told)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.name)
@pytest.mark.parametrize("config", COVERED.values(), ids=COVERED.keys())
def test_both_depths_give_the_same_bits(
    config: LayerConfig, record: KernelEntry, fresh_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = layer_at("auto", config, record.name, fresh_seed)
    steps = layer_at("steps", config, record.name, fresh_seed)
    assert type(steps) is MoERunner
    calls: list[int] = []
    watch(deep, calls, monkeypatch)
    counters = [runner.make_load_counter() for runner in (deep, steps)]
    generator = torch.Generator().manual_seed(fresh_seed)
    for count in (1, 0, 3, FEW, FEW + 1):
        x = tokens(count, fresh_seed + count)
        # Whole numbers, so that many logits are equal: the lowest id must win at either depth.
        equal = torch.randint(0, 3, (count, EXPERTS), generator=generator).bfloat16()
        for logits in (None, equal):
            (y, routing), (expected, theirs) = (
                runner.forward_with_routing(x, logits, observers=Observers(load=counter))
                for runner, counter in zip((deep, steps), counters, strict=True)
            )
            assert torch.equal(y, expected)
            assert torch.equal(routing.topk_ids, theirs.topk_ids)
            assert torch.equal(routing.topk_weights, theirs.topk_weights)
    assert calls == [1, 1, 3, 3, FEW, FEW]
    assert counters[0].read() == counters[1].read()


def test_asked_for_by_name_it_takes_any_number_of_tokens(fresh_seed: int) -> None:
    x = tokens(33, fresh_seed)
    outputs = [layer_at(depth, PLAIN, seed=fresh_seed)(x) for depth in ("one-call", "steps")]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("depth", ["auto", "steps"])
def test_bad_input_is_the_same_error(depth: Depth) -> None:
    runner = layer_at(depth, PLAIN)
    logits = torch.zeros(2, EXPERTS)
    logits[1, 4] = float("nan")
    with pytest.raises(RemoteRankError, match=r"rank 0: ValueError: router logits of token 1 are not finite"):
        runner(tokens(2, 0), logits)
    with pytest.raises(RemoteRankError, match="router_logits are 8 wide, the layer has 9 experts"):
        runner(tokens(2, 0), torch.zeros(2, 8))
    with pytest.raises(RemoteRankError, match=r"the layer computes in torch\.bfloat16"):
        runner(tokens(2, 0).float())
    with pytest.raises(RemoteRankError, match=r"residual of shape \(3, \d+\).*expected the shape \(2, "):
        runner(tokens(2, 0), residual=tokens(3, 0))
    with pytest.raises(RemoteRankError, match="residual is on meta, hidden_states are on cpu"):
        runner(tokens(2, 0), residual=tokens(2, 0).to("meta"))


@pytest.mark.parametrize("depth", ["auto", "steps"])
def test_a_residual_is_added_last(depth: Depth, fresh_seed: int) -> None:
    runner, x, residual = layer_at(depth, PLAIN, seed=fresh_seed), tokens(3, fresh_seed), tokens(3, 1)
    assert torch.equal(runner(x, residual=residual), runner(x) + residual)
    kept = x.clone()
    assert torch.equal(runner(x, residual=x), runner(kept) + kept) and torch.equal(x, kept)
    apart = residual.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(runner(x, residual=apart), runner(x) + residual)
    assert runner(x[:0], residual=x[:0]).shape == (0, x.shape[1])


def test_another_router_routes_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, calls = layer_at("auto", PLAIN), list[int]()
    watch(runner, calls, monkeypatch)
    _, routing = runner.forward_with_routing(tokens(2, 0), router=SimulatedLoadRule("all-to-one", EXPERTS, 2))
    assert routing.topk_ids.tolist() == [[0, 1], [0, 1]] and not calls


def test_in_parts_and_with_a_clock(fresh_seed: int) -> None:
    deep, steps = (layer_at(depth, PLAIN, seed=fresh_seed) for depth in ("auto", "steps"))
    x = tokens(3, fresh_seed)
    assert torch.equal(MicroBatches(deep, 2)(x), MicroBatches(steps, 2)(x))
    clock = MeasuringTimer()
    traffic = deep.run(x, observers=Observers(clock, clock)).traffic
    assert traffic == steps.run(x).traffic
    assert clock.read().slots == 9 and clock.seconds["compute"] > 0 == clock.seconds["plan"]


REFUSED: dict[str, tuple[LayerConfig, LayerOptions, str]] = {
    "scores": (
        replace(PLAIN, router=RouterConfig(3, scoring="sigmoid")),
        LayerOptions(),
        "onednn routes by softmax, not by sigmoid",
    ),
    "groups": (
        replace(PLAIN, router=RouterConfig(3, num_expert_group=3, topk_group=1)),
        LayerOptions(),
        "without groups and correction bias",
    ),
    "bias": (
        replace(PLAIN, router=RouterConfig(3, correction_bias=True)),
        LayerOptions(),
        "without groups and correction bias",
    ),
    "identity": (
        replace(PLAIN, router=RouterConfig(3, zero_experts=2)),
        LayerOptions(),
        "does not route with identity experts",
    ),
    "input": (
        replace(PLAIN, router=RouterConfig(1, weight_on_input=True)),
        LayerOptions(),
        "does not route with weights on the input",
    ),
    "latent": (replace(PLAIN, latent_size=32), LayerOptions(), "a latent space, a norm or an output bias"),
    "exact": (PLAIN, LayerOptions(exact=True), "exact mode adds"),
    "fused": (
        replace(PLAIN, shared=SharedConfig(WIDTH)),
        LayerOptions(fuse_shared_experts=True),
        "the slots of fused shared experts",
    ),
    "dispatcher": (PLAIN, LayerOptions("alltoall"), "alltoall was asked for"),
    "kernel": (PLAIN, LayerOptions(kernel="reference"), "reference only computes"),
}


@pytest.mark.parametrize("config, options, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_goes_step_by_step(config: LayerConfig, options: LayerOptions, message: str) -> None:
    layer = SyntheticLayer(config, torch.bfloat16, 0)
    # Which kernel has rows that do not depend on each other hangs on the processor.
    kernel = "native" if options.exact and not multiplies_bfloat16() else "onednn"
    named = options if options.kernel != "auto" else replace(options, kernel=kernel)
    built = build_layer(config, ProcessGrid.single(), torch.bfloat16, layer.read, named)
    assert type(built) is MoERunner
    with pytest.raises(ValueError, match=f"depth='one-call': .*{message}.*; choose auto"):
        build_layer(
            config, ProcessGrid.single(), torch.bfloat16, layer.read, replace(named, depth="one-call")
        )


def test_an_unknown_depth() -> None:
    with pytest.raises(ValueError, match="depth='deep': choose one of auto, steps, one-call"):
        layer_at("deep", PLAIN)  # type: ignore[arg-type]
