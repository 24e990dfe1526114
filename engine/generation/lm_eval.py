"""A whole model as lm-evaluation-harness wants it; that package is an optional extra.

The harness runs on rank 0 and asks; see :mod:`xpar.engine.generation.service`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.service import Continuations, Prompts, Service

NAME = "xpar"
POSITIONS = 2048
"""Of a model that names no limit, as the harness takes it."""
MAX_NEW_TOKENS = 256


def model_class() -> type["LmEvalAdapter"]:
    """The class whose objects the harness can evaluate."""
    from lm_eval.api.model import TemplateLM

    class XparLM(LmEvalAdapter, TemplateLM):  # type: ignore[misc] # the package need not be there
        pass

    return XparLM


def register_service(service: Service, path: str) -> None:
    """Make ``--model xpar`` of the harness mean this one."""
    from lm_eval.api.registry import register_model

    @register_model(NAME)
    class _(model_class()):  # type: ignore[misc] # as above
        def __init__(self, **_: object) -> None:
            super().__init__(service, path)


class LmEvalAdapter:
    """The methods of a model of the harness. ``service``: the model. ``path``: of its checkpoint."""

    def __init__(self, service: Service, path: str) -> None:
        super().__init__()
        self.service, self.path = service, path
        self.tokenizer = service.tokens.tokenizer
        self.max_length = service.tokens.positions or POSITIONS

    # -- tokens ---------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        return self.path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        begin = self.tokenizer.bos_token
        if add_special_tokens is None and begin and string.startswith(begin):
            given = {"add_special_tokens": False}  # a chat template has written it already
        return list(self.tokenizer(string, **given)["input_ids"])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # -- what the harness asks ------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of (anything, context, continuation): the sum over the continuation, and whether it is greedy."""
        texts = []
        for _words, context, continuation in requests:
            ids = [*context, *continuation][-(self.max_length + 1) :]
            texts.append((ids, max(1, len(ids) - len(continuation))))
        return list(self.service.ask(Continuations(tuple(texts))))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += logprob
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        groups: dict[tuple[Sampling, int, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(_options(request.args[1]), []).append(number)
        texts = [""] * len(requests)
        for (sampling, most, stops), numbers in groups.items():
            room = self.max_length - most
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={most}: the model has {self.max_length} positions; ask for fewer"
                )
            prompts = tuple(self.tok_encode(requests[n].args[0])[-room:] for n in numbers)
            answers = self.service.ask(Prompts(prompts, most, stops, sampling))
            for number, text in zip(numbers, answers, strict=True):
                texts[number] = text
        return texts


def _options(given: Mapping[str, Any]) -> tuple[Sampling, int, tuple[str, ...]]:
    """The harness's words for a way to draw."""
    from lm_eval.models.utils import normalize_gen_kwargs

    options = normalize_gen_kwargs(dict(given), MAX_NEW_TOKENS)
    temperature = float(options.get("temperature") or 0.0)
    stops = tuple(stop for stop in options["until"] if stop)
    if temperature == 0.0:
        return Sampling(), int(options["max_gen_toks"]), stops
    sampling = Sampling(temperature, int(options.get("top_k") or 0), float(options.get("top_p") or 1.0))
    return sampling, int(options["max_gen_toks"]), stops
