"""Check the products of codes on a GPU piece by piece, to see which one is wrong.

Needs one GPU, not part of the test run.

    python tests/gpu/check_codes.py [--paths] [CASE ...]

The cases are those of the interpreter's tests and three of gpt-oss's size. Of each are compared: rows as two
terms, their sums, the first product, the second one, the whole layer; with inline PTX and without, with
copies in flight and without. With ``--paths`` only whole layers are, on each way of their kernel: vectors,
and weights that become bfloat16, in tiles of 16, 32, 64 and 128 rows. Prints one line for each and ends with
1 if any is wrong.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [
    str(ROOT / ".typing"),
    str(ROOT / "tests" / "support"),
    str(ROOT / "tests" / "kernels" / "gpu"),
]

import torch
from coded_layers import Case, Layer, decoded_table, small_table
from test_nibble_experts import CASES as NIBBLES
from test_nibble_experts import NibbleLayer
from test_quantised_experts import CASES as CODES
from torch import Tensor

from xpar.kernels.activations import activate
from xpar.kernels.contracts import ExpertInput
from xpar.kernels.gpu.code_tables import CodeTable, Height
from xpar.kernels.gpu.expert_sort import plan_tiles
from xpar.kernels.gpu.nibble_experts import NibbleExperts, Terms
from xpar.kernels.gpu.quantised_experts import QuantisedExperts
from xpar.kernels.gpu.tile_tables import NO_LIMIT, Limits, Machine
from xpar.kernels.quantised_weight import QuantisedWeight

BOUND = 6e-3
DEVICE = "cuda"


@dataclass(frozen=True)
class Variant:
    """A way to launch: with inline PTX or without, and a change of the table."""

    name: str
    has_asm: bool = True
    stages: int | None = None
    small: bool = False
    vector: bool = False
    decoded: int = 0

    @property
    def is_path(self) -> bool:
        return self.vector or bool(self.decoded)


VARIANTS = (
    Variant("as launched"),
    Variant("without PTX", has_asm=False),
    Variant("one copy", stages=1),
    Variant("small tiles", small=True),
)
PATHS = (
    Variant("vector", vector=True),
    *(Variant(f"bfloat16 in tiles of {rows}", decoded=rows) for rows in (16, 32, 64, 128)),
)


def move(weight: QuantisedWeight) -> QuantisedWeight:
    """Return ``weight`` on the GPU."""
    parts = {name: getattr(weight, name) for name in ("codes", "scales", "zeros", "global_scale")}
    return replace(weight, **{name: t.to(DEVICE) for name, t in parts.items() if t is not None})


def table_of(default: CodeTable, variant: Variant) -> CodeTable:
    if variant.small:
        return small_table(16, True)
    if variant.decoded:
        return decoded_table(variant.decoded)
    if variant.vector:
        return replace(default, vector_tokens=100)
    if variant.stages is None:
        return default

    def change(height: Height) -> Height:
        tiles = {n: replace(getattr(height, n), stages=variant.stages) for n in ("gate_up", "down")}
        return replace(height, **tiles)

    return replace(default, heights=tuple(change(h) for h in default.heights))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.float().cpu() - expected).norm() / expected.norm())


def value_of(terms: Terms) -> Tensor:
    """The rows that codes and scales stand for, [M, K] float32."""
    codes, scales, _ = terms
    return codes.view(torch.float8_e4m3fn).float().sum(0) * scales.T.repeat_interleave(128, 1)


def sums_of(terms: Terms) -> Tensor:
    """The sums of the codes, [M, runs] float32."""
    codes, _, sums = terms
    return codes.view(torch.float8_e4m3fn).float().cpu().sum(0).unflatten(1, (len(sums), -1)).sum(2)


def check_pieces(layer: NibbleLayer, kernel: NibbleExperts, x: ExpertInput) -> dict[str, float]:
    """Errors of the split rows, and of each product from right inputs."""
    spec, top_k = layer.spec, x.topk_ids.shape[1]
    height = kernel.table.height(x.topk_ids.numel(), spec.num_experts)
    plan = plan_tiles(
        x.topk_ids.contiguous(), spec.num_experts, (height.gate_up,) * 3, Limits(NO_LIMIT, NO_LIMIT)
    )
    active = int(plan.offsets[-1])
    slots = plan.slots[:active].cpu().long()
    read = layer.x.hidden_states[layer.x.rows].float()
    found = {}
    rows = kernel.split(x.hidden_states, x.rows, kernel._depth)
    found["split"] = error(value_of(rows)[:, : spec.hidden_size], read)
    if kernel._format.zero is not None:
        found["sums"] = error(rows[2].T, sums_of(rows))
    middle = torch.zeros(len(x.topk_ids) * top_k, kernel._width)
    out = torch.zeros(len(x.topk_ids) * top_k, spec.hidden_size)
    for r, slot in enumerate(slots.tolist()):
        expert = int(layer.x.topk_ids.flatten()[slot])
        gate_up, down = (w.dequantise() for w in layer.weights[expert])
        bias = [b[expert].float() for b in layer.biases] or [0.0, 0.0]
        y = activate(read[slot // top_k] @ gate_up.T + bias[0], spec.activation)
        middle[r, : spec.intermediate_size] = y
        out[slot] = y.bfloat16().float() @ down.T + bias[1]
    hidden = kernel.multiply_gate_up(height, rows, plan, top_k)
    found["gate_up"] = error(value_of(hidden)[:active], middle[:active])
    got = torch.zeros(out.shape, dtype=torch.bfloat16, device=DEVICE)
    right = kernel.split(middle.bfloat16().to(DEVICE), None, kernel._width)
    kernel.multiply_down(height, right, plan, got)
    found["down"] = error(got, out)
    return found


def check_terms(layer: Layer, kernel: QuantisedExperts, x: ExpertInput) -> dict[str, float]:
    """Errors of the rows' codes, if they have two terms."""
    if kernel.scheme:
        return {}
    codes, scales = kernel._quantise(x.hidden_states, x.rows, kernel._depth)
    read = layer.x.hidden_states[layer.x.rows].float()
    return {"split": error(value_of((codes, scales, scales))[:, : layer.spec.hidden_size], read)}


def check(name: str, case: Case, is_nibble: bool, tokens: int, paths: bool) -> bool:
    """Print the errors of every variant of a case, or every path; return whether all are small."""
    machine, good = Machine.of(DEVICE), True
    layer = (NibbleLayer if is_nibble else Layer)(case, torch.Generator().manual_seed(tokens), tokens=tokens)
    spec = replace(layer.spec, device=DEVICE)
    x = ExpertInput(
        *(t.to(DEVICE) for t in (layer.x.hidden_states, layer.x.topk_ids, layer.x.topk_weights, layer.x.rows))
    )
    weights = [tuple(map(move, pair)) for pair in layer.weights]
    expected = layer.dequantised() if case.scheme is None else layer.emulated(case.scheme)
    if paths:
        variants = PATHS if case.scheme is None else PATHS[:1]
        expected = layer.dequantised()
    else:
        variants = VARIANTS if is_nibble else VARIANTS[::2]
    for variant in variants:
        try:
            if is_nibble:
                kernel = NibbleExperts(spec, None, machine, variant.has_asm)
            else:
                kernel = QuantisedExperts(spec, None, machine)
            kernel.table = table_of(kernel.table, variant)
            for e, pair in enumerate(weights):
                kernel.load_quantised(e, *pair, *(b[e].to(DEVICE) for b in layer.biases))
            found = {}
            if not variant.is_path:
                found = check_pieces(layer, kernel, x) if is_nibble else check_terms(layer, kernel, x)
            if not variant.vector:
                kernel.table = replace(kernel.table, vector_tokens=0)
            found["layer"] = error(kernel.compute(x), expected)
        except Exception as problem:  # noqa: BLE001 - the next variant may run
            say(f"{name}, {tokens} tokens, {variant.name}: {type(problem).__name__}: {problem}")
            good = False
            continue
        good &= all(value < BOUND for value in found.values())
        errors = ", ".join(f"{piece} {value:.1e}" for piece, value in found.items())
        say(f"{name}, {tokens} tokens, {variant.name}: {errors}")
    return good


def say(line: str) -> None:
    """Print a line at once, so that a run that is cut off has said what it found."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(names: list[str]) -> int:
    """Check all cases, or those of ``names``."""
    paths, names = "--paths" in names, [name for name in names if name != "--paths"]
    oss = replace(NIBBLES["mxfp4"], hidden=2880, width=2880)
    int4, e4m3 = NIBBLES["int4 by 128"].fmt, CODES["channel alone"].fmt
    nibbles = {**NIBBLES, "gpt-oss mxfp4": oss, "gpt-oss int4": replace(oss, fmt=int4)}
    codes = {**CODES, "gpt-oss e4m3": replace(oss, fmt=e4m3)}
    cases = {**{n: (c, True) for n, c in nibbles.items()}, **{n: (c, False) for n, c in codes.items()}}
    results = [
        check(name, *cases[name], tokens, paths)
        for name in names or cases
        if not name.startswith("decoded")
        for tokens in (11, 90)
    ]
    say(f"{sum(results)} of {len(results)} right")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
