"""Answers that are JSON of a schema, by the package ``llguidance``, which says what tokens may come next."""

import json
from typing import Any

import torch
from torch import Tensor

from xpar.engine.generation.token_choice import LineError

INSTALL = (
    "response_format needs the package llguidance, which is not installed: pip install 'xpar[grammar]', or "
    "leave the field out"
)

BLANKS: Any = {"whitespace_pattern": r"( |\n {0,64})"}
"""What may stand between two words of JSON: nothing, a blank, or a new line with its indentation.

JSON itself allows blanks without end, and some models write them until no token is left.
"""


class Grammars:
    """The grammars of one tokenizer's answers, each compiled once.

    ``vocabulary``: rows of the model's embedding. ``ends``: tokens that end an answer. Raises ValueError
    where the package or the tokenizer cannot do it.
    """

    def __init__(self, tokenizer: Any, vocabulary: int | None, ends: frozenset[int]) -> None:
        try:
            import llguidance
        except ImportError:
            raise ValueError(INSTALL) from None
        if not ends:
            raise ValueError("response_format needs a token that ends answers, and the model has none")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError("response_format needs a fast tokenizer (tokenizer.json), and this is none")
        self._library = llguidance
        self._tokens = llguidance.LLTokenizer(backend.to_str(), n_vocab=vocabulary, eos_token=sorted(ends))
        self._compiled: dict[str, Any] = {}

    def check(self, schema: str) -> None:
        """Raise ValueError for a ``schema``, as JSON, that cannot be followed."""
        self._compile(schema)

    def mask(self, schema: str, prompt: int) -> "GrammarMask":
        """Make the mask for one answer behind ``prompt`` tokens."""
        return GrammarMask(self._compile(schema).deep_copy(), prompt)

    def _compile(self, schema: str) -> Any:
        if schema not in self._compiled:
            matcher = self._library.LLMatcher
            grammar = matcher.grammar_from_json_schema(json.loads(schema), overrides=BLANKS)
            made = matcher(self._tokens, grammar, log_level=0)
            if made.is_error():
                why = str(made.get_error()).strip().splitlines()[0]
                raise ValueError(f"response_format: the JSON schema cannot be followed ({why})")
            self._compiled[schema] = made
        return self._compiled[schema]


class GrammarMask:
    """The ban of the tokens that the grammar of one answer does not allow next.

    ``matcher``: the state of the grammar, which follows the answer. ``prompt``: tokens before it.
    """

    def __init__(self, matcher: Any, prompt: int) -> None:
        self._matcher, self._read = matcher, prompt

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Ban tokens in ``logits`` [1, V] after the tokens ``ids`` [1, S]."""
        new = ids[0, self._read :].tolist()
        self._read += len(new)
        self._matcher.consume_tokens(new)
        allowed = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        if self._matcher.is_error():
            raise LineError(f"response_format: {str(self._matcher.get_error()).strip().splitlines()[0]}")
        bits = (allowed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
        mask = torch.zeros(logits.shape[1], dtype=torch.bool)
        count = min(bits.numel(), mask.numel())
        mask[:count] = bits.flatten()[:count].bool()
        return logits.masked_fill(~mask, -torch.inf)
