"""Checks of the GPU kernels: against float64, in a CUDA graph, and bit for bit by row."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from xpar.engine.bench.kernels.cases import LayerCase, Weights, load_experts, random_input, random_weights
from xpar.engine.config import RouterConfig
from xpar.engine.routing import TopKRule
from xpar.kernels import rows
from xpar.kernels.contracts import Activation, ExpertInput, ExpertKernel, ExpertSpec
from xpar.kernels.gpu.availability import build
from xpar.kernels.gpu.default_tables import default_table, former_table
from xpar.kernels.gpu.expert_sort import plan_tiles
from xpar.kernels.gpu.experts import TritonExperts
from xpar.kernels.gpu.tile_tables import NO_LIMIT, Height, Limits, Machine, Table
from xpar.kernels.reference import mlp

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
"""Largest relative error of a result."""
Check = tuple[str, Callable[[], str]]
"""Name of a check, and a function that returns its result as text or raises AssertionError."""
ACTIVATIONS = [
    Activation("silu"),
    Activation("silu", limit=7.0, alpha=1.702, beta=1.0),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("swiglustep", limit=1.0),
    Activation("situ", beta=2.0, limit=1.5),
    Activation("silu", gated=False),
    Activation("gelu", gated=False),
    Activation("gelu_tanh", gated=False),
    Activation("relu2", gated=False),
]


def poison(device: torch.device) -> None:
    """Leave NaN in the memory that the allocator gives out next, to find unwritten values."""
    blocks = [torch.full((n,), float("nan"), device=device) for n in (1 << 8, 1 << 16, 1 << 22, 1 << 28)]
    del blocks


def expected_rows(spec: ExpertSpec, weights: Weights, x: ExpertInput, tokens: Tensor) -> Tensor:
    """Compute the outputs [len(tokens), H] float64 of some tokens of ``x``, expert by expert."""
    hidden = (x.hidden_states if x.rows is None else x.hidden_states[x.rows])[tokens].double()
    ids, router = x.topk_ids[tokens], x.topk_weights[tokens].double()
    out = torch.zeros(len(tokens), spec.hidden_size, dtype=torch.float64, device=hidden.device)
    for expert in torch.unique(ids[ids >= 0]).tolist():
        row, slot = (ids == expert).nonzero(as_tuple=True)
        tensors = (weights.gate_up[expert], weights.down[expert], *(bias[expert] for bias in weights.biases))
        y = mlp(hidden[row], spec.activation, *tensors, dtype=torch.float64)
        out.index_add_(0, row, y * router[row, slot, None])
    return out


def require_near(got: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> str:
    """Compare ``got`` with float64 ``expected`` by the tolerance of ``dtype``; return the error.

    Raises AssertionError, which names ``what``, for an error above the tolerance, or NaN.
    """
    error = float((got.double() - expected).norm() / expected.norm().clamp_min(1e-30))
    if not error <= TOLERANCE[dtype]:
        raise AssertionError(f"{what}: relative error {error:.2e} exceeds {TOLERANCE[dtype]:.0e}")
    return f"{error:.1e}"


def small_checks(g: torch.Generator) -> Iterator[Check]:
    """Yield the checks on small layers, the shortest first."""
    yield "rows", partial(check_rows, g)
    yield "router", partial(check_router, g)
    for dtype in TOLERANCE:
        for activation in ACTIVATIONS:
            if dtype == torch.bfloat16 or activation in ACTIVATIONS[:2]:
                yield f"{_name(dtype)} {activation}", partial(check_activation, dtype, activation, g)
    for dtype in TOLERANCE:
        yield f"row invariance {_name(dtype)}", partial(check_row_invariance, dtype, g)
    yield "sorts", partial(check_sorts, g)
    yield "forms", partial(check_forms, g)
    if torch.cuda.get_device_capability(g.device) == (9, 0):
        yield "dependent launches", partial(check_dependent, g)
    yield "graph", partial(check_graph, g)
    yield "offsets past 2^31", partial(check_long, g)


def layer_checks(
    layer: LayerCase, kernel: ExpertKernel, weights: Weights, g: torch.Generator, tokens: tuple[int, ...]
) -> Iterator[Check]:
    """Yield a check of the whole layer for each number of tokens; see :func:`check_tokens`."""
    for m in tokens:
        yield f"{layer.name} M={m}", partial(check_tokens, layer, kernel, weights, g, m)


def check_tokens(
    layer: LayerCase, kernel: ExpertKernel, weights: Weights, g: torch.Generator, tokens: int
) -> str:
    """Check a layer on a skewed step with an empty expert; return the relative error as text.

    All rows must be finite, and 16 of them near float64.
    """
    spec = kernel.spec
    x = random_input(spec, tokens, layer.top_k, layer.of, g, skewed=True)
    sample = torch.randperm(tokens, generator=g, device=g.device)[:16]
    expected = expected_rows(spec, weights, x, sample)
    poison(g.device)
    got = kernel.compute(x)
    if not bool(torch.isfinite(got).all()):
        raise AssertionError(f"{int((~torch.isfinite(got)).any(1).sum())} of {tokens} rows are not finite")
    return require_near(got[sample], expected, spec.dtype, "sampled tokens")


def check_activation(dtype: torch.dtype, activation: Activation, g: torch.Generator) -> str:
    """Check ``compute`` and ``compute_slots`` with one activation, on all buckets, ragged widths and rows."""
    errors = []
    shapes = [(200, 136, True), (500, 260, False)]
    for hidden, width, bias in (
        shapes if activation == ACTIVATIONS[0] and dtype == torch.bfloat16 else shapes[:1]
    ):
        spec = ExpertSpec(6, hidden, width, dtype, activation, str(g.device), bias=bias)
        weights = random_weights(spec, g)
        kernel = build(spec)
        load_experts(kernel, weights)
        for m in (1, 33, 300, 1200):
            x = random_input(spec, m, 2, 8, g, skewed=True)
            index = torch.randint(m, (m,), generator=g, device=g.device)
            x = ExpertInput(x.hidden_states, x.topk_ids, x.topk_weights, index)
            expected = expected_rows(spec, weights, x, torch.arange(m, device=g.device))
            poison(g.device)
            errors.append(require_near(kernel.compute(x), expected, dtype, f"H={hidden} M={m} compute"))
            slots = kernel.compute_slots(x)
            positions = (x.topk_ids.reshape(-1) >= 0).cumsum(0).view(x.topk_ids.shape) - 1
            summed = torch.zeros_like(expected)
            row, slot = (x.topk_ids >= 0).nonzero(as_tuple=True)
            summed.index_add_(
                0, row, slots[positions[row, slot]].double() * x.topk_weights[row, slot, None].double()
            )
            errors.append(require_near(summed, expected, dtype, f"H={hidden} M={m} compute_slots"))
    return max(errors, key=float)


def check_sorts(g: torch.Generator) -> str:
    """Check that the sort by ranks and the sort in blocks give torch's order, some slots being foreign."""
    tiles = default_table(Machine.of(g.device), torch.bfloat16, 64).gate_up
    for slots in (1, 8, 100, 512, 2056, 4096, 9000):
        for experts in (5, 256):
            ids = torch.randint(-1, experts, (slots, 1), generator=g, device=g.device, dtype=torch.int32)
            flat = ids.reshape(-1)
            expected = torch.sort(flat, stable=True).indices[int((flat < 0).sum()) :]
            for ranked in (0, slots):
                for limits in (Limits(NO_LIMIT, NO_LIMIT), Limits(16, 64), Limits(0, 0)):
                    poison(g.device)
                    plan = plan_tiles(ids, experts, tiles, limits, ranked_slots=ranked)
                    if not torch.equal(plan.slots[: len(expected)].long(), expected):
                        raise AssertionError(f"{slots} slots, {experts} experts, {ranked=}: wrong order")
    return "same order"


def forms_of(machine: Machine) -> dict[str, Table]:
    """Return a table for each way to compute a batch.

    They are the lists of before, and the tiles of each height of narrow and wide experts, with rows in expert
    order and gathered.
    """
    narrow, table = (default_table(machine, torch.bfloat16, width) for width in (1, NO_LIMIT))
    heights = (*table.heights, *narrow.heights)
    tiles = dict.fromkeys(height.tiles for height in heights if height.tiles is not None)
    more = [replace(t, tall=False, gathered=True) for t in tiles if not t.swapped]
    forms = {str(t): replace(table, heights=(Height(NO_LIMIT, t),)) for t in dict.fromkeys([*tiles, *more])}
    return {"lists": former_table(table), **forms}


def check_forms(g: torch.Generator) -> str:
    """Check every form of the table on experts with none, few and hundreds of rows."""
    errors = []
    spec = ExpertSpec(6, 200, 136, torch.bfloat16, ACTIVATIONS[1], str(g.device), bias=True)
    weights, kernel = random_weights(spec, g), TritonExperts(spec)
    load_experts(kernel, weights)
    for name, table in forms_of(kernel.machine).items():
        kernel.table = table
        for m in (9, 300, 1200):
            x = random_input(spec, m, 2, 8, g, skewed=True)
            expected = expected_rows(spec, weights, x, torch.arange(m, device=g.device))
            poison(g.device)
            errors.append(require_near(kernel.compute(x), expected, spec.dtype, f"M={m} {name}"))
    return max(errors, key=float)


def check_dependent(g: torch.Generator) -> str:
    """Check that launches which begin early give the bits of others, in many calls after each other."""
    spec = ExpertSpec(16, 512, 256, torch.bfloat16, Activation("silu"), str(g.device))
    weights, kernel = random_weights(spec, g), TritonExperts(spec)
    load_experts(kernel, weights)
    gathered = {name: form for name, form in forms_of(kernel.machine).items() if "gathered=True" in name}
    for name, form in {"heights": replace(kernel.table, dependent=False), **gathered}.items():
        for m in (2, 9, 300, 1200):
            inputs = [random_input(spec, m, 4, 16, g) for _ in range(3)]
            kernel.table = form
            expected = [kernel.compute(x) for x in inputs]
            kernel.table = replace(form, dependent=True, prefetch=256)
            kernel.compute(inputs[0])
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                replayed = [kernel.compute(x) for x in inputs * 4]
            poison(g.device)
            graph.replay()
            launched = [kernel.compute(x) for x in inputs * 20]
            for found in (launched, replayed):
                if not all(torch.equal(y, expected[n % 3]) for n, y in enumerate(found)):
                    raise AssertionError(f"M={m} {name}: other bits")
    return "same bits"


def check_row_invariance(dtype: torch.dtype, g: torch.Generator) -> str:
    """Check that a row-invariant kernel gives a row the same bits in batches of any size."""
    spec = ExpertSpec(8, 512, 256, dtype, Activation("silu"), str(g.device), row_invariant=True)
    weights = random_weights(spec, g)
    kernel = build(spec)
    load_experts(kernel, weights)
    x = random_input(spec, 700, 2, 8, g)
    whole, summed = kernel.compute_slots(x).view(700, 2, -1), kernel.compute(x)
    for m in (1, 2, 5, 16, 17, 64, 100, 513):
        pick = torch.randperm(700, generator=g, device=g.device)[:m]
        part = ExpertInput(x.hidden_states, x.topk_ids[pick], x.topk_weights[pick], pick)
        if not torch.equal(kernel.compute_slots(part).view(m, 2, -1), whole[pick]):
            raise AssertionError(f"slots of {m} rows alone have other bits")
        if not torch.equal(kernel.compute(part), summed[pick]):
            raise AssertionError(f"sums of {m} rows alone have other bits")
    return "same bits"


def check_graph(g: torch.Generator) -> str:
    """Check that a captured call uses its inputs' values at replay, twice with the same bits."""
    spec = ExpertSpec(16, 512, 256, torch.bfloat16, Activation("silu"), str(g.device))
    weights = random_weights(spec, g)
    kernel = build(spec)
    load_experts(kernel, weights)
    for m in (2, 40, 500):
        x = random_input(spec, m, 4, 16, g)
        kernel.compute(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = kernel.compute(x)
        kernel.compute(random_input(spec, 4 * m, 4, 16, g))  # a larger call in between takes no memory away
        new = random_input(spec, m, 4, 16, g, skewed=True)
        for captured, fresh in ((x.hidden_states, new.hidden_states), (x.topk_ids, new.topk_ids),
                            (x.topk_weights, new.topk_weights)):  # fmt: skip
            captured.copy_(fresh)
        poison(g.device)
        graph.replay()
        first = out.clone()
        graph.replay()
        if not torch.equal(first, out):
            raise AssertionError(f"two replays of M={m} differ")
        expected = expected_rows(spec, weights, new, torch.arange(m, device=g.device))
        require_near(out, expected, spec.dtype, f"replayed M={m}")
    return "right"


def check_long(g: torch.Generator) -> str:
    """Check a step whose slots have more elements than a 32-bit index counts."""
    spec = ExpertSpec(4, 7168, 64, torch.bfloat16, Activation("silu"), str(g.device))
    weights = random_weights(spec, g)
    kernel = build(spec)
    load_experts(kernel, weights)
    tokens = (1 << 31) // (4 * spec.hidden_size) + 5000
    x = random_input(spec, tokens, 4, 4, g)
    sample = torch.cat([torch.arange(8), torch.arange(tokens - 8, tokens)]).to(g.device)
    return require_near(
        kernel.compute(x)[sample], expected_rows(spec, weights, x, sample), spec.dtype, "ends"
    )


def check_rows(g: torch.Generator) -> str:
    """Check gathering and sums of rows against torch in float64."""
    errors = []
    for dtype in TOLERANCE:
        source = torch.randn(600, 1300, generator=g, device=g.device).to(dtype)
        index = torch.randint(600, (900,), generator=g, device=g.device)
        if not torch.equal(rows.gather_rows(source, index), source[index]):
            raise AssertionError(f"gather_rows {dtype}")
        targets = torch.randint(100, (600,), generator=g, device=g.device)
        exact = torch.zeros(100, 1300, dtype=torch.float64, device=g.device).index_add_(
            0, targets, source.double()
        )
        errors.append(require_near(rows.sum_rows(source, targets, 100), exact, dtype, "sum_rows"))
        order = torch.sort(targets, stable=True).indices
        sizes = torch.bincount(targets, minlength=100)
        errors.append(require_near(rows.sum_runs(source, order, sizes), exact, dtype, "sum_runs"))
        positions = torch.randint(-1, 600, (200, 3), generator=g, device=g.device)
        weights = torch.rand(200, 3, generator=g, device=g.device)
        terms = source[positions.clamp(min=0)].double() * weights.double()[..., None]
        exact = (terms * (positions >= 0)[..., None]).sum(1)
        weights[positions < 0] = float("nan")
        errors.append(
            require_near(rows.weighted_sum(source, weights, positions), exact, dtype, "weighted_sum")
        )
    return max(errors, key=float)


def check_router(g: torch.Generator) -> str:
    """Check the router: ids equal to the CPU's, and weights near the CPU's."""
    from xpar.kernels.gpu import route

    configs = {
        8: RouterConfig(2), 64: RouterConfig(8, renormalize=False), 128: RouterConfig(8),
        160: RouterConfig(6, renormalize=False, num_expert_group=8, topk_group=3, routed_scaling_factor=16.0),
        256: RouterConfig(8, "sigmoid", num_expert_group=8, topk_group=4, group_score="top2_sum",
                          correction_bias=True, routed_scaling_factor=2.5),
    }  # fmt: skip
    worst = 0.0
    for experts, c in configs.items():
        assert c.scoring != "sqrtsoftplus"
        logits = torch.randn(1000, experts, generator=g, device=g.device)
        bias = torch.randn(experts, generator=g, device=g.device) if c.correction_bias else None
        expected = TopKRule(c, None if bias is None else bias.cpu()).route(None, logits.cpu())
        got = route.select_experts(
            logits, c.top_k, scoring=c.scoring, renormalize=c.renormalize,
            num_expert_group=c.num_expert_group, topk_group=c.topk_group, group_score=c.group_score,
            correction_bias=bias,
            routed_scaling_factor=c.routed_scaling_factor,
        )  # fmt: skip
        same = (got.topk_ids.cpu() == expected.topk_ids).all(1)
        if float(same.float().mean()) < 0.999:  # scores a rounding apart may change places
            raise AssertionError(f"{experts} experts: {int((~same).sum())} of 1000 tokens choose others")
        error = (got.topk_weights.cpu() - expected.topk_weights)[same].abs().max() / c.routed_scaling_factor
        worst = max(worst, float(error))
    if worst > 1e-5:
        raise AssertionError(f"weights differ by {worst:.1e}")
    return f"{worst:.1e}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
