"""A forward of transformers' model over a flat batch: one stream of the tokens of several sequences.

The model gets ids [1, T], positions [1, T] and a mask that is made already. Its cache gives new keys and
values back as they are; the attention function writes them into the pool and reads the pool, as transformers'
own attention over pages does. It finds the pool by the mask and its layer by the attention module. Whether a
model works in this way is found out of the model by one forward, in which every cache layer, every mask and
every argument of the attention is looked at. T tokens; Hq query heads; D, D' numbers of a key, a value.
"""

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from xpar.engine.models.attention import ASKS_FOR_NAME
from xpar.engine.models.cache_argument import cache_argument
from xpar.engine.models.isolation import rows_isolated
from xpar.engine.models.kv_cache import other_states
from xpar.engine.models.kv_pool import FlatTokens, KvPool, LayerForm, PagedStep
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.rows import SeparateRows
from xpar.engine.models.span_pool import SpanPool, SpanStep
from xpar.kernels.gpu.span_attention import why_not_flash

IMPLEMENTATION, PROBING = "xpar-flat", "xpar-probing"
"""The names of the attention, and of the one that looks at a model."""
LAYER, STEP, WINDOW = "xpar_flat_layer", "xpar_step", "xpar_window"
"""The attributes of an attention module, of the mask of a step, and of a mask that is looked at."""
FOUND = "xpar_flat_forms"
"""The attribute of a model that keeps what was found out of it."""
HARMLESS = {"position_ids", "use_cache", "is_causal", "cache_position", "logits_to_keep", "sliding_window"}
"""Arguments of the attention that change nothing here; the window is read off the mask."""
COMPUTED = {"dropout", "scaling", "s_aux", "softcap"}
FAR = 1 << 14
"""Tokens within which a mask is compared with the one that it should be."""
PROBED = 3
"""Tokens of the forward that looks at a model."""


@dataclass(frozen=True)
class _Layer:
    """The place of an attention module's keys and values in a pool.

    ``writes``: whether the module writes them; otherwise it reads those of the layer before it.
    """

    number: int
    writes: bool


class FlatForward:
    """The forward of ``loaded`` over flat batches, with keys and values in ``pool``.

    ``pool`` has the forms that :func:`flat_forms` found, in their order.
    """

    def __init__(self, loaded: LoadedModel, pool: KvPool | SpanPool) -> None:
        self._model, self._layers, self._pool = loaded.model, loaded.layers, pool
        self.device = loaded.device
        self._configs = _attention_configs(loaded.model)
        self._cache = _cache_class()()
        # Four dimensions: transformers takes it for a mask that is made already, and hands it on.
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=loaded.device)

    def __call__(self, tokens: FlatTokens) -> Tensor:
        """Compute logits [W, V] after the tokens that are wanted."""
        host = (tokens.ids, tokens.positions, tokens.wanted)
        ids, positions, wanted = (torch.from_numpy(numbers).to(self.device) for numbers in host)
        return self.forward(ids, positions, wanted, self._pool.step(tokens))

    @torch.inference_mode()
    def forward(self, ids: Tensor, positions: Tensor, wanted: Tensor, step: PagedStep | SpanStep) -> Tensor:
        """Compute logits [W, V] after the tokens ``wanted`` [W] of ``ids`` [T] at ``positions`` [T].

        All tensors are int64 on the model's device, and ``step`` is one of the pool.
        """
        setattr(self._mask, STEP, (self._pool, step))
        with _implementation(self._configs, IMPLEMENTATION), rows_isolated(self._layers):
            out: Any = self._model(
                input_ids=ids[None],
                attention_mask=self._mask,
                position_ids=positions[None],
                use_cache=True,
                logits_to_keep=wanted,
                **cache_argument(self._model, self._cache),
            )
        logits: Tensor = out.logits[0]
        return logits


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Write ``key`` [1, Hk, T, D] and ``value`` [1, Hk, T, D'] into the pool and attend to what is there.

    ``query`` [1, Hq, T, D]. Returns [1, T, Hq, D'].
    """
    layer: _Layer = getattr(module, LAYER)
    pool, step = getattr(attention_mask, STEP)
    if layer.writes:
        pool.write(layer.number, key, value, step)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = query[0].transpose(0, 1).contiguous()
    return pool.attend(layer.number, rows, step, scale, s_aux, softcap)[None], None


def flat_forms(loaded: LoadedModel) -> tuple[LayerForm, ...] | str:
    """Return the forms of the layers of keys and values of ``loaded``, or why it takes no flat batches.

    Collective. The reason is a clause; it follows from the model and the options alone, so that all ranks
    find the same.
    """
    found: tuple[LayerForm, ...] | str | None = getattr(loaded.model, FOUND, None)
    if found is None:
        found = _reason(loaded) or _probe(loaded)
        setattr(loaded.model, FOUND, found)
    return found


def _reason(loaded: LoadedModel) -> str | None:
    """Return why no forward need be tried, if there is a reason."""
    model = loaded.model
    if any(layer.runner.options.exact for layer in loaded.layers):
        return "in exact mode a sequence is computed by itself"
    if states := other_states(model.config):
        return f"it keeps more than keys and values of the past ({', '.join(states)})"
    rows = SeparateRows(model)
    if rows.rereads or rows.depend_on_length:
        return "its rotary factors depend on the length of the whole text"
    own = {type(module).__module__ for module in model.modules() if hasattr(module, "_supports_sdpa")}
    if not model._can_set_attn_implementation() or any(
        ASKS_FOR_NAME.search(inspect.getsource(sys.modules[name])) for name in own
    ):
        return "it computes its attention itself"
    return None


class _Probe:
    """The record of a forward that looks at a model: its layers, and the first thing that is odd, if any."""

    def __init__(self) -> None:
        self.forms: list[LayerForm] = []
        self.problem: str | None = None
        self._layers: dict[Any, _Layer] = {}
        self._keys: list[
            Tensor
        ] = []  # those of each layer, alive, so that none takes the identity of another
        self._cached = 0
        self.computes: set[str] = set()

    def update(self) -> None:
        """Note that the model has handed keys and values to its cache."""
        self._cached += 1

    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Note a call of the attention; return zeros [1, T, Hq, D']."""
        window: tuple[int | None] | None = getattr(attention_mask, WINDOW, None)
        self.problem = self.problem or self._oddity(module, query, key, value, others)
        if window is None:
            self.problem = self.problem or "its attention has a mask that is neither causal nor a window"
        if self.problem is None and window is not None:
            form = LayerForm(key.shape[1], key.shape[3], value.shape[3], key.dtype, window[0])
            known = next((n for n, keys in enumerate(self._keys) if keys is key), None)
            if known is None:
                self.forms.append(form)
                self._keys.append(key)
            elif self.forms[known] != form:
                self.problem = "its layers read one layer's keys and values in several ways"
            self._layers[module] = _Layer(len(self.forms) - 1 if known is None else known, known is None)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1]), None

    def _oddity(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, others: Mapping[str, Any]
    ) -> str | None:
        if [key.shape[0], key.shape[2], *value.shape[:3]] != [1, PROBED, 1, key.shape[1], PROBED]:
            return f"its keys are {list(key.shape)} and its values {list(value.shape)} for {PROBED} tokens"
        if query.shape[2] != PROBED or query.shape[1] % key.shape[1] or key.dtype != value.dtype:
            return f"its queries are {list(query.shape)} for keys of {list(key.shape)}"
        if module in self._layers:
            return "an attention of it is called twice"
        given = {name for name, value in others.items() if value is not None and value is not False}
        self.computes |= given & COMPUTED
        if odd := given - HARMLESS - COMPUTED:
            return f"its attention has further arguments ({', '.join(sorted(odd))})"
        return None

    def keep(self) -> tuple[LayerForm, ...] | str:
        """Mark the attention modules with their layers and return the forms, or say what is odd."""
        if self.problem is None and (not self.forms or self._cached != len(self.forms)):
            self.problem = (
                f"{self._cached} of its layers keep keys and values, and {len(self.forms)} give them to "
                "transformers' attention interface"
            )
        if self.problem is not None:
            return self.problem
        for module, layer in self._layers.items():
            setattr(module, LAYER, layer)
        return tuple(self.forms)


def _probe(loaded: LoadedModel) -> tuple[LayerForm, ...] | str:
    """Run a forward that notes what the model asks of its cache, its masks and its attention."""
    probe = _Probe()
    _register(probe)
    configs = _attention_configs(loaded.model)
    # A checkpoint with numbers that are not finite fails its lines, not this forward.
    with torch.inference_mode(), rows_isolated(loaded.layers), _implementation(configs, PROBING):
        out: Any = loaded.model(
            input_ids=torch.zeros(1, PROBED, dtype=torch.int64, device=loaded.device),
            position_ids=torch.arange(PROBED, device=loaded.device)[None],
            use_cache=True,
            logits_to_keep=torch.tensor([1], device=loaded.device),
            **cache_argument(loaded.model, _cache_class()(probe.update)),
        )
    for layer in loaded.layers:
        layer.reset_slots()  # the forward above was not a user's
    if out.logits.shape[:2] != (1, 1):
        return "it does not give the logits of chosen tokens"
    forms = probe.keep()
    if loaded.device.type == "cpu" or isinstance(forms, str):
        return forms
    return why_no_spans(forms, probe.computes) or tuple(replace(form, pads_values=True) for form in forms)


def why_no_spans(forms: Sequence[LayerForm], computes: Collection[str]) -> str | None:
    """Return the reason why a GPU computes no flat batches with layers of ``forms``, or None.

    ``computes``: the arguments that the model gives to its attention.
    """
    if "softcap" in computes:
        return "its attention has a soft cap, and torch's over spans has none"
    reasons = (why_not_flash(form.dtype, form.key_width, form.value_width) for form in forms)
    return next((reason for reason in reasons if reason is not None), None)


def _mask(
    q_length: int,
    mask_function: Callable[..., Any],
    local_size: int | None = None,
    device: torch.device | str | None = None,
    **_: Any,
) -> Tensor:
    """Stand in for a mask [1, 1, T, 1], marked with its window, in a tuple, if it has the form of one."""
    made = torch.ones(1, 1, q_length, 1, dtype=torch.bool, device=device)
    draw = torch.Generator().manual_seed(0)
    place = torch.randint(FAR, (FAR,), generator=draw)
    near = place - torch.randint(2 * (local_size or FAR), (FAR,), generator=draw) + 1
    column = near.clamp(min=0)
    expected = column <= place
    if local_size is not None:
        expected &= column > place - local_size
    zero = torch.zeros((), dtype=torch.int64)
    if torch.equal(torch.as_tensor(mask_function(zero, zero, place, column)).expand(FAR), expected):
        setattr(made, WINDOW, (local_size,))
    return made


def _register(probe: _Probe) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)
    ALL_ATTENTION_FUNCTIONS.register(PROBING, probe.attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PROBING, _mask)


def _attention_configs(model: Any) -> list[Any]:
    """List the configs in which ``model``'s modules look up the name of their attention."""
    configs = (getattr(module, "config", None) for module in model.modules())
    found = {id(config): config for config in configs if hasattr(config, "_attn_implementation_internal")}
    return list(found.values())


@contextmanager
def _implementation(configs: Sequence[Any], name: str) -> Iterator[None]:
    """Let the modules with ``configs`` use the attention ``name`` while the block runs.

    transformers' own setter goes through all parts of a config, which a step has no time for.
    """
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = name
    try:
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            config._attn_implementation_internal = old


@cache
def _cache_class() -> Any:
    """Return a class: transformers' cache, which keeps nothing and gives new keys and values back."""
    from transformers import DynamicCache

    class PassingCache(DynamicCache):  # type: ignore[misc] # transformers is optional
        def __init__(self, noted: Callable[[], None] = lambda: None) -> None:
            super().__init__()
            self._noted = noted

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            self._noted()
            return key_states, value_states

    return PassingCache
