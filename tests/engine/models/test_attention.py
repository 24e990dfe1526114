"""The attention of models is transformers' ``sdpa`` wherever it is used, and leaves the rest alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from moe_families import Case
from tiny_models import write_model
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from xpar.engine.models.attention import IMPLEMENTATION, AttentionForward, use_xpar_attention
from xpar.engine.models.cache_argument import cache_argument, cache_of
from xpar.kernels.cpu.attention import Attention


class Layer(torch.nn.Module):
    """The attributes that transformers' functions need of an attention module."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups, self.is_causal = groups, True


def drawn(seed: int, queries: int, keys: int, groups: int = 2) -> tuple[Layer, list[torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    shapes = ((3, 2 * groups, queries, 32), (3, 2, keys, 32), (3, 2, keys, 32))
    return Layer(groups), [torch.randn(*shape, generator=g) for shape in shapes]


def own(monkeypatch: pytest.MonkeyPatch) -> AttentionForward:
    """One that fails where it leaves the work to transformers."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("left to transformers")

    monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", refuse)
    return AttentionForward()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("mask", ["none", "padding", "additive"])
@pytest.mark.parametrize("scaling", [None, 0.4])
def test_one_query_is_sdpa(
    monkeypatch: pytest.MonkeyPatch, fresh_seed: int, groups: int, mask: str, scaling: float | None
) -> None:
    layer, tensors = drawn(fresh_seed, 1, 41, groups)
    seen = torch.arange(41) >= torch.tensor([0, 7, 40])[:, None, None, None]
    masks = {"none": None, "padding": seen, "additive": torch.where(seen, 0.0, -9.0)}
    expected = sdpa_attention_forward(layer, *tensors, masks[mask], 0.0, scaling)[0]
    found, weights = own(monkeypatch)(layer, *tensors, masks[mask], scaling=scaling, sliding_window=None)
    assert weights is None and found.shape == expected.shape and found.is_contiguous()
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("is_causal", [None, False, True])
def test_a_prompt_is_sdpa(fresh_seed: int, is_causal: bool | None) -> None:
    """Batches of which zentorch computes attention where it is installed."""
    layer, tensors = drawn(fresh_seed, 23, 23)
    expected = sdpa_attention_forward(layer, *tensors, None, is_causal=is_causal)[0]
    found = AttentionForward()(layer, *tensors, None, is_causal=is_causal)[0]
    assert torch.allclose(found, expected, atol=1e-5)


def position_bias(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 1, 41, generator=torch.Generator().manual_seed(seed))


OTHERS: dict[str, dict[str, Any]] = {
    "position_bias": {"position_bias": position_bias(1)},
    "dropout": {"dropout": 0.5},
    "s_aux": {"s_aux": torch.ones(4)},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_not_covered_is_left_to_transformers(
    monkeypatch: pytest.MonkeyPatch, fresh_seed: int, what: str
) -> None:
    layer, tensors = drawn(fresh_seed, 1, 41)
    torch.manual_seed(fresh_seed)
    expected = sdpa_attention_forward(layer, *tensors, None, **OTHERS[what])[0]
    torch.manual_seed(fresh_seed)
    assert torch.equal(AttentionForward()(layer, *tensors, None, **OTHERS[what])[0], expected)
    with pytest.raises(AssertionError, match="left to transformers"):
        own(monkeypatch)(layer, *tensors, None, **OTHERS[what])


def test_soft_caps_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch, fresh_seed: int) -> None:
    """Which refuses them from some version on."""
    layer, tensors = drawn(fresh_seed, 1, 41)
    with pytest.raises(AssertionError, match="left to transformers"):
        own(monkeypatch)(layer, *tensors, None, softcap=30.0)


def test_gradients_and_pieces_of_prompts_are_left_to_transformers(
    monkeypatch: pytest.MonkeyPatch, fresh_seed: int
) -> None:
    forward = own(monkeypatch)
    layer, tensors = drawn(fresh_seed, 1, 41)
    with pytest.raises(AssertionError, match="left to transformers"):
        forward(layer, tensors[0].requires_grad_(), *tensors[1:], None)
    layer, tensors = drawn(fresh_seed, 5, 41)
    with pytest.raises(AssertionError, match="left to transformers"):
        forward(layer, *tensors, None)


@pytest.mark.parametrize(("family", "chosen"), [("olmoe", IMPLEMENTATION), ("gpt_oss", "eager")])
def test_only_models_of_sdpa_are_given_it(tmp_path: Path, family: str, chosen: str) -> None:
    write_model(Case(family, family), tmp_path / family, torch.float32, 1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / family)
    assert use_xpar_attention(model) == (chosen == IMPLEMENTATION)
    assert model.config._attn_implementation == chosen


def test_a_padded_batch_of_a_model(tmp_path: Path, fresh_seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are made for it as for ``sdpa``, of a prompt and of the token behind it.

    Keys are shared by two heads.
    """
    write_model(Case("mixtral", "mixtral"), tmp_path / "model", torch.float32, 1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    g = torch.Generator().manual_seed(fresh_seed)
    ids, seen = torch.randint(0, 256, (3, 10), generator=g), torch.ones(3, 10, dtype=torch.int64)
    seen[0, :4] = 0

    def logits() -> torch.Tensor:
        prompt = model(ids[:, :9], attention_mask=seen[:, :9], use_cache=True)
        token = model(ids[:, 9:], attention_mask=seen, **cache_argument(model, cache_of(prompt)))
        return torch.cat([prompt.logits, token.logits], 1)

    used, whole = [], Attention.__call__

    def watched(self: Attention, query: torch.Tensor, *rest: Any) -> torch.Tensor:
        used.append(query.shape[2])
        return whole(self, query, *rest)

    monkeypatch.setattr(Attention, "__call__", watched)
    with torch.inference_mode():
        expected = logits()
        assert use_xpar_attention(model) and not used
        found = logits()
    assert 1 in used  # of the prompt only where this processor has a faster way
    kept = seen.bool()
    assert torch.allclose(found[kept], expected[kept], atol=1e-5)
