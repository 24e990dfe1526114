"""The choice whether the inputs of quantised experts are quantised, too, by facts that all ranks share."""

from dataclasses import dataclass

import torch

from xpar.engine.config import LayerConfig, StoredActivations
from xpar.engine.layer.options import ACTIVATIONS, Activations
from xpar.kernels.quantised_weight import ActivationScheme
from xpar.kernels.row_format import RowFormat


@dataclass(frozen=True)
class InputScheme:
    """Whether rows are quantised before they travel to experts, and why.

    Attributes:
        row_format: The form in which they travel; None: as they are.
        reason: Why that is so.
    """

    row_format: RowFormat | None
    reason: str

    @property
    def scheme(self) -> ActivationScheme | None:
        """The scheme by which rows are quantised, or None."""
        return None if self.row_format is None else self.row_format.scheme

    def explain(self) -> str:
        """Describe the form of rows in one line."""
        form = "rows travel as they are" if self.row_format is None else f"rows travel as {self.row_format}"
        return f"{form}: {self.reason}"


def choose_input_scheme(
    config: LayerConfig, device: torch.device, dtype: torch.dtype, wanted: Activations, exact: bool
) -> InputScheme:
    """Choose for a layer that computes in ``dtype``; ``wanted`` is the option ``activations``.

    Raises ValueError for an unknown option, and for quantised rows that cannot be had.
    """
    stored = config.activations
    why = why_exact(stored, device, dtype, wanted, exact)
    if why is not None or stored.scheme is None:
        return InputScheme(None, why or stored.why_not)
    form, plain = RowFormat(config.routed_size, stored.scheme), config.routed_size * dtype.itemsize
    if form.nbytes >= plain:
        return InputScheme(None, f"with its scales a row has {form.nbytes} bytes, and {plain} as it is")
    size = f"{form.nbytes} bytes in place of {plain}"
    if stored.is_of_batch:
        size += "; a scale for each token is finer than the checkpoint's, one for all tokens of a batch"
    asked = "they were asked for" if wanted == "quantised" else "the checkpoint quantises inputs of experts"
    return InputScheme(form, f"{asked}, {size}")


def why_exact(
    stored: StoredActivations, device: torch.device, dtype: torch.dtype, wanted: Activations, exact: bool
) -> str | None:
    """Return the reason why inputs of experts stay as they are, or None if they are quantised.

    The arguments are as for :func:`choose_input_scheme`, and it raises the same errors.
    """
    if wanted not in ACTIVATIONS:
        raise ValueError(f"activations={wanted!r}: choose one of {', '.join(ACTIVATIONS)}")
    if wanted == "exact":
        return "exact activations were asked for"
    why = stored.why_not if stored.scheme is None else None
    if stored.is_of_batch and exact:
        why = "the checkpoint asks for one scale for all tokens of a batch, which exact mode rules out"
    if why is not None:
        if wanted == "quantised":
            raise ValueError(f"activations='quantised': {why}; choose auto or exact")
        return why
    return _nearer(device, dtype, exact) if wanted == "auto" else None


def _nearer(device: torch.device, dtype: torch.dtype, exact: bool) -> str | None:
    """Return why ``auto`` leaves inputs as they are, which is nearer to the model before quantisation."""
    if device.type == "cpu":
        return "CPUs compute from quantised weights alone (--activations quantised: half the bytes)"
    if exact:
        return "in exact mode no kernel on GPUs computes from quantised inputs"
    if dtype == torch.float32:
        return "float32 was asked for"
    return None
