"""The choice of the batch that suits a model: flat, padded, or with prompts or sequences of equal length."""

import logging

from xpar.engine.generation.decode_batch import DecodeBatch
from xpar.engine.generation.flat_batch import FlatBatch, FlatLimits
from xpar.engine.generation.flat_recorder import FlatRecorder
from xpar.engine.generation.grouped_batch import GroupedBatch
from xpar.engine.generation.kv_memory import BatchRoom, choose_blocks, free_share
from xpar.engine.generation.lengthwise_batch import LengthwiseBatch
from xpar.engine.generation.recorder import DecodeGraph
from xpar.engine.generation.running_sequence import RunningSequence, StopConditions
from xpar.engine.generation.sampling import Sampling
from xpar.engine.generation.steps import LocalBatch
from xpar.engine.models.flat_forward import flat_forms
from xpar.engine.models.kv_pool import KvPool
from xpar.engine.models.loaded_model import LoadedModel
from xpar.engine.models.span_pool import SpanPool
from xpar.engine.models.state_cache import mixes_lengths
from xpar.kernels.gpu.span_attention import SpanAttention

log = logging.getLogger("xpar.models")


def choose_batch(
    loaded: LoadedModel,
    sampling: Sampling,
    stop_conditions: StopConditions,
    records: bool = True,
    room: BatchRoom = BatchRoom(),  # noqa: B008 - frozen
) -> LocalBatch[RunningSequence]:
    """Make the batch that suits ``loaded``. Collective.

    It is flat where the model's attention fits; padded for other models that keep keys and values alone; else
    it reads prompts of equal length together, and continues all sequences together or, where states count
    their tokens, those of equal length.

    ``records``: whether steps are recorded, where a GPU and the model allow it.
    """
    forms = flat_forms(loaded)
    if not isinstance(forms, str):
        blocks = choose_blocks(forms, room, free_share(loaded))
        size = FlatLimits(room.most_rows, room.prefill_tokens, room.shares_prefixes)
        if loaded.device.type == "cpu":
            return FlatBatch(loaded, sampling, stop_conditions, KvPool(forms, blocks), size)
        spans = SpanPool(forms, blocks, loaded.device, SpanAttention())
        recorder = FlatRecorder.of(loaded, spans) if records else None
        return FlatBatch(loaded, sampling, stop_conditions, spans, size, recorder)
    log.info("%s is run in padded batches without shared beginnings: %s", type(loaded.model).__name__, forms)
    if not mixes_lengths(loaded.model):
        return GroupedBatch(loaded, sampling, stop_conditions)
    batch = DecodeBatch(loaded, sampling, stop_conditions, DecodeGraph.of(loaded) if records else None)
    return batch if loaded.is_cache_of_keys_and_values else LengthwiseBatch(batch)
