"""The course that ``xpar generate`` and ``xpar score`` share: from a file of prompts or texts to results."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from xpar.comm.communicator import Communicator
from xpar.comm.failure import agreed
from xpar.engine.commands import model_session
from xpar.engine.commands.model_names import find_checkpoint
from xpar.engine.commands.options import attach
from xpar.engine.console.logs import start_logging
from xpar.engine.console.terminal import make_console
from xpar.engine.generation.lockstep import Progress
from xpar.engine.generation.request import Request, ScoreRequest, Workload, read_request
from xpar.engine.generation.run_file import RunSummary, finish_only, watch_for_stop
from xpar.engine.generation.tokenizer import Tokenizer
from xpar.engine.models.loaded_model import LoadedModel

Q = TypeVar("Q", Request, ScoreRequest)
StopRequested = Callable[[], bool]
OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class FileCommand(Generic[Q]):
    """The parts in which the commands on files differ.

    Attributes:
        make_request: Makes the request of the options, or raises ValueError. The second argument says whether
            this is the rank that reads and writes the files; the other ranks need not see them.
        make_tokenizer: Reads the tokenizer of a request, and lines for the console.
        process: Works through the file: communicator, request, work, tokenizer, model, and the two last
            arguments of :func:`~xpar.engine.generation.run_file.process_file`.
        doing: The title of the progress bar, such as "answering".
        done: The words behind the number of results, such as "prompts answered".
        summarize: Describes all results of the file in one line; collective.
        settle: Chooses what a request leaves open once the model is loaded; returns it and a line for the
            console. Collective.
    """

    make_request: Callable[[argparse.Namespace, bool], Q]
    make_tokenizer: Callable[[argparse.Namespace, Q], tuple[Tokenizer, Sequence[str]]]
    process: Callable[
        [Communicator, Q, Workload, Tokenizer, LoadedModel, StopRequested, OnProgress], RunSummary
    ]
    doing: str
    done: str
    summarize: Callable[[Communicator, Q], str] | None = None
    settle: Callable[[Communicator, Q, Workload, LoadedModel], tuple[Q, str]] | None = None


def run_request(args: argparse.Namespace, command: FileCommand[Q]) -> int:
    """Run ``command`` on every rank; return 0, also if a signal ended it with everything written."""
    # The signal counts from the first moment: a job that is pre-empted while it loads has lost nothing.
    stop_requested = watch_for_stop()
    world = attach(args)
    comm = world.comm
    start_logging(world, args.verbose)
    args.model_name = str(args.checkpoint)
    args.checkpoint = find_checkpoint(comm, args.checkpoint)
    request = agreed(comm, lambda: command.make_request(args, world.rank == 0))
    console = make_console(world)
    grid = model_session.make_grid(args, world, console)
    request = replace(
        request,
        exact_with=model_session.exact_with(args, grid),
        activations=agreed(comm, lambda: model_session.activations_of(args, grid, request.dtype)),
    )
    tokenizer, notes = agreed(comm, lambda: command.make_tokenizer(args, request))
    for note in notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)
    work = read_request(comm, request, tokenizer, args.resume)
    for note in work.notes:
        console.print(note, soft_wrap=True, markup=False, highlight=False)
    outcome = None
    if work.queue:
        loaded = model_session.load(args, grid, request.dtype, console, getattr(args, "whole_dense", True))
        if command.settle is not None:
            request, line = command.settle(comm, request, work, loaded)
            console.print(line, soft_wrap=True, markup=False, highlight=False)
        with model_session.meter(world, command.doing, work) as on_progress:
            outcome = command.process(comm, request, work, tokenizer, loaded, stop_requested, on_progress)
    else:
        finish_only(comm, request, work)
    new, failed = (outcome.answers, outcome.failed) if outcome else (0, 0)
    console.print(model_session.counts(request, work, new, failed, command.done), soft_wrap=True)
    if command.summarize is not None:
        console.print(command.summarize(comm, request), soft_wrap=True)
    if outcome:
        if outcome.tokens:
            console.print(model_session.speed(outcome), soft_wrap=True)
        console.print(model_session.memory(comm), soft_wrap=True)
    model_session.check_any_answered(comm, request, work, failed)
    return 0
