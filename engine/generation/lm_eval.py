"""The adapter of a whole model for lm-evaluation-harness, which runs on rank 0 and asks the service."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xpar.engine.generation.generation_defaults import DRAWS, OTHER_WAYS, SETTABLE, ModelDefaults, settle
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.service import Continuations, Prompts, Service

NAME = "xpar"
POSITIONS = 2048
"""The positions of a model that names no limit, as the harness takes it."""
MAX_NEW_TOKENS = 256
log = logging.getLogger("xpar.models")
UNLIMITED = 10**9
"""More positions than any model has: what tokenizers name that know no limit."""


def model_class() -> type["LmEvalAdapter"]:
    """Make the class whose objects the harness can evaluate."""
    from lm_eval.api.model import TemplateLM

    class XparLM(LmEvalAdapter, TemplateLM):  # type: ignore[misc] # the package need not be there
        pass

    return XparLM


def register_service(service: Service, path: str) -> None:
    """Register ``service`` as ``--model xpar`` of the harness."""
    from lm_eval.api.registry import register_model

    @register_model(NAME)
    class _(model_class()):  # type: ignore[misc] # as above
        def __init__(self, **_: object) -> None:
            super().__init__(service, path)


class LmEvalAdapter:
    """The methods of a model of the harness, computed by ``service``; ``path``: its checkpoint."""

    def __init__(self, service: Service, path: str) -> None:
        super().__init__()
        self.service, self.path = service, path
        self.is_warned = False
        self.tokenizer = service.tokenizer.tokenizer
        limit = getattr(self.tokenizer, "model_max_length", None) or UNLIMITED
        self.max_length = service.tokenizer.window or (int(limit) if limit < UNLIMITED else POSITIONS)

    # -- tokens
    # ---------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it."""
        prefix = self.service.tokenizer.prefix_id
        if prefix is None:
            raise ValueError(
                "the tokenizer names no token that begins or ends texts; the harness asks for one"
            )
        return prefix

    @property
    def tokenizer_name(self) -> str:
        return self.path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        if add_special_tokens is None and self.service.tokenizer.begins_itself(string):
            given = {"add_special_tokens": False}  # a chat template has written it already
        return list(self.tokenizer(string, **given)["input_ids"])

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Cut as the harness does, but leave out what the tokenizer puts behind every text."""
        ids, first = self.service.tokenizer.join(context, continuation)
        if not self.is_warned and self.service.tokenizer.spans_join(context, continuation, ids):
            self.is_warned = True
            log.warning(
                "a token spans the end of the context %r and the beginning of the continuation %r: only what "
                "stands behind it is scored, as the harness defines it; further ones are not reported",
                context[-40:],
                continuation[:40],
            )
        return ids[:first], ids[first:]

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

    # -- what the harness asks
    # ------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Score (anything, context, continuation): sum over the continuation, and whether it is greedy."""
        texts = []
        for words, context, continuation in requests:
            if not context or not continuation or len(continuation) > self.max_length:
                raise ValueError(_refusal(words, len(context), len(continuation), self.max_length))
            ids = [*context, *continuation][-(self.max_length + 1) :]
            texts.append((ids, len(ids) - len(continuation)))
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
            groups.setdefault(_options(request.args[1], self.service.tokenizer.defaults), []).append(number)
        end = self.tokenizer.decode([self.eot_token_id]) if self.tokenizer.eos_token_id is not None else ""
        texts = [""] * len(requests)
        for (sampling, most, stops), numbers in groups.items():
            room = self.max_length - most
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={most}: the model has {self.max_length} positions; ask for fewer"
                )
            prompts = tuple(self.tok_encode(requests[n].args[0])[-room:] for n in numbers)
            # The harness's own backend ends answers at the tokenizer's end token, whatever the model's
            # defaults name.
            answers = self.service.ask(Prompts(prompts, most, (*stops, *([end] if end else [])), sampling))
            for number, text in zip(numbers, answers, strict=True):
                texts[number] = text
        return texts


def _refusal(words: Any, context: int, continuation: int, most: int) -> str:
    """Describe why a pair of so many tokens cannot be scored; ``words`` are its texts, if known."""
    if not context:
        why = "the context has no tokens, and the tokenizer begins texts with none"
    elif not continuation:
        why = "no token of the two is the continuation's alone, so that there is nothing to score"
    else:
        why = f"the continuation has {continuation} tokens, and the model positions for {most}"
    pair = "" if words is None else f"context {words[0][-40:]!r}, continuation {words[1][:40]!r}: "
    return f"{pair}{why}; change the task's texts"


def _options(given: Mapping[str, Any], defaults: ModelDefaults) -> tuple[Sampling, int, tuple[str, ...]]:
    """Settle the harness's options before the model's defaults, as its backend for transformers does."""
    from lm_eval.models.utils import normalize_gen_kwargs

    options = normalize_gen_kwargs(dict(given), MAX_NEW_TOKENS)
    known = {name: options[name] for name in (*SETTABLE, *OTHER_WAYS) if name in options}
    if not known.get("do_sample"):
        known = {name: value for name, value in known.items() if name not in DRAWS}
    most = int(options["max_gen_toks"])
    generation = settle(defaults, known, most)
    for note in generation.notes:
        log.info("%s", note)
    stops = (*(stop for stop in options["until"] if stop), *generation.stops)
    return generation.sampling, most, stops
