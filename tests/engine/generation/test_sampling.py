"""The choice of a token among logits, against plain statements of what it must do."""

import pytest
import torch

from xpar.engine.generation import sampling
from xpar.engine.generation.sampling import Sampling


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 5.0]], dtype=torch.bfloat16)
    sampling = Sampling()
    assert sampling.choose(logits, [sampling.generator("x")] * 2) == [1, 2]
    with pytest.raises(ValueError, match="logits are not finite"):
        sampling.choose(logits * float("nan"), [sampling.generator("x")] * 2)


def test_draws_follow_the_probabilities_that_are_left(fresh_seed: int) -> None:
    """Among the 3 likeliest of 4, those that make up 0.8: by temperature 2 the two first, at 0.57 to 0.43."""
    logits = 2 * torch.tensor([[0.40, 0.30, 0.20, 0.10]]).log()
    sampling = Sampling(temperature=2.0, top_k=3, top_p=0.75, seed=fresh_seed)
    generator = sampling.generator("prompt")
    drawn = [sampling.choose(logits, [generator])[0] for _ in range(4000)]
    assert set(drawn) == {0, 1}
    assert abs(drawn.count(0) / 4000 - 4 / 7) < 0.05
    again = sampling.generator("prompt")
    assert [sampling.choose(logits, [again])[0] for _ in range(50)] == drawn[:50]
    other = sampling.generator("another prompt")
    assert [sampling.choose(logits, [other])[0] for _ in range(50)] != drawn[:50]


def test_a_temperature_near_zero_is_the_likeliest_token() -> None:
    """Logits over such a temperature overflow.

    A row beside them, whose do not, is drawn as if it were alone.
    """
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 5.0]])
    sampling = Sampling(temperature=1e-40)
    assert sampling.choose(logits, [sampling.generator("x"), sampling.generator("y")]) == [1, 2]
    mixed = torch.tensor([[0.0, 3.0e38, 1.0], [1.0, 1.5, 2.0]])
    warm = Sampling(temperature=0.5, top_k=2)
    assert torch.equal(warm._warped(mixed)[1], warm._warped(mixed[1:])[0])
    assert warm.choose(mixed, [warm.generator("x"), warm.generator("y")])[0] == 1


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_logit_that_is_not_finite_is_found_wherever_it_is(fresh_seed: int, value: str) -> None:
    draw = torch.Generator().manual_seed(fresh_seed)
    logits = torch.randn(5, 300, generator=draw).bfloat16()
    expected = logits.argmax(dim=-1).tolist()
    assert Sampling().choose(logits, ()) == expected
    row, column = (int(torch.randint(n, (), generator=draw)) for n in logits.shape)
    logits[row, column] = float(value)
    with pytest.raises(ValueError, match="logits are not finite"):
        Sampling().choose(logits, ())


def test_the_lowest_id_of_equals_is_found(fresh_seed: int) -> None:
    """On a GPU, too, where ``argmax`` takes any of them; many logits of two bytes are equal."""
    draw = torch.Generator().manual_seed(fresh_seed)
    logits = torch.randint(5, (64, 33), generator=draw).bfloat16()
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert sampling._first_on_gpu(logits == logits.amax(dim=-1, keepdim=True)).tolist() == expected
    with torch.inference_mode():
        assert Sampling().choose(logits.clone(), ()) == expected
