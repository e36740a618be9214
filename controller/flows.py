"""What commands write and read while they run: which output goes to which job, and which input to which hosts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from controller import api
from controller.jobs import Job
from controller.shelf import DiskShelf
from controller.state import State
from controller.streaming import Recorded, Sending, Streaming
from protocol import events, ranks
from protocol.commands import Input
from protocol.feeding import InputWindow
from protocol.flow import Window, nobody_reads
from protocol.messages import Grant
from protocol.outcomes import Fold
from protocol.ranks import Ranks

#: The numbers of pieces of input begin here, far from those of jobs, which people type. Nobody remembers them.
_PIECES = 1 << 61


class Flows:
    """The streams of all commands, by the command's number, and the memory that they share."""

    def __init__(
        self,
        directory: Path,
        state: State,
        *,
        grant: Callable[[int, tuple[Grant, ...]], None],
        give: Callable[[int, Ranks, Input], None],
    ) -> None:
        """`directory` is where input waits for slow hosts. `grant` lets hosts send more of a command's output; `give`
        gives a piece of input, under a number of its own, to hosts."""
        self._directory = directory
        self._state = state
        self._grant, self._give = grant, give
        self._outputs: dict[int, tuple[Job, Streaming]] = {}
        self._inputs: dict[int, Sending] = {}
        self._pieces = itertools.count(_PIECES)
        self._window, self._input_window = Window(), InputWindow()

    # --- output -------------------------------------------------------------------------------------------------------

    def first(self, hosts: int) -> int:
        """How many bytes each of so many hosts may send unasked."""
        return self._window.first(hosts)

    def begin_output(self, job: Job, id_: int, targets: bytes, first: int) -> Streaming:
        """The output of this command goes to a job, as far as its client reads."""
        streaming = Streaming(
            ranks.each(ranks.unpack(targets)),
            first,
            self._window,
            grant=partial(self._grant, id_),
            tell=partial(self._tell_recorded, job),
        )
        self._outputs[id_] = job, streaming
        return streaming

    def __contains__(self, id_: int) -> bool:
        """Whether there is output of this command that its client has not been told of."""
        return id_ in self._outputs

    def streamed(self, piece: events.TellStream, job: Job | None) -> None:
        """A piece of a command's output came; `job` is the one that it is a part of, if there is one."""
        id_, rank, stream, offset, data = piece.id, piece.rank, piece.stream, piece.offset, piece.data
        if id_ not in self._outputs:
            if job is not None:  # a console's, which has a window of its own
                job.say(api.Streamed(rank=rank, stream=stream, offset=offset, data=data))
            else:
                self._grant(id_, nobody_reads([rank]))
            return
        job, streaming = self._outputs[id_]
        fresh = streaming.arrived(rank, stream, offset, data, piece.has, fast=piece.fast)
        if fresh:
            begin = offset + len(data) - len(fresh)
            job.tell_client(api.Streamed(rank=rank, stream=stream, offset=begin, data=fresh))
        streaming.passed_on()

    def outcomes(self, id_: int, folds: Sequence[Fold], rows: Sequence[int]) -> bool:
        """Outcomes came and are on record under `rows`. Whether they are of a command that streams: its job is told
        here then, of each behind its output."""
        if id_ not in self._outputs:
            return False
        job, streaming = self._outputs[id_]
        self._tell_recorded(job, streaming.outcomes(folds, rows))
        return True

    def _tell_recorded(self, job: Job, outcomes: Iterable[Recorded]) -> None:
        """Tell a job outcomes that are on record, each for some of its hosts."""

        def read(row: int, who: bytes) -> Fold:
            return msgspec.structs.replace(self._state.outcome(row), ranks=who)

        for row, who in outcomes:
            job.fold(read(row, who), partial(read, row, who))

    def when_told(self, id_: int, then: Callable[[Job], None]) -> bool:
        """Call `then` once the job of a command that streams has all outcomes, each behind its output. Whether it
        is such a command."""
        if id_ not in self._outputs:
            return False
        job, streaming = self._outputs[id_]

        def told() -> None:
            del self._outputs[id_]
            then(job)

        streaming.when_told(told)
        return True

    # --- input --------------------------------------------------------------------------------------------------------

    def begin_input(self, job: Job, id_: int, who: Ranks, broken: Callable[[OSError], None]) -> None:
        """What a job's client sends is the input of this command. `broken`: what waited for hosts can't be read."""
        self._inputs[id_] = job.sending = Sending(
            id_,
            ranks.each(who),
            self._input_window,
            DiskShelf(self._directory),
            give=lambda some, piece: self._give(next(self._pieces), some, piece),
            room=lambda upto: job.tell_client(api.InputRoom(upto=upto)),
            broken=broken,
        )

    def taken(self, told: events.TellTaken) -> None:
        """A host has read of its input."""
        if told.id in self._inputs:
            self._inputs[told.id].taken(told.rank, told.taken, is_open=told.open, anew=told.anew)

    def over(self, id_: int, folds: Iterable[Fold]) -> None:
        """These hosts have their outcome, and read no more."""
        if id_ in self._inputs:
            self._inputs[id_].over(folds)

    def end_input(self, id_: int) -> None:
        """All hosts have theirs."""
        if id_ in self._inputs:
            self._inputs.pop(id_).close()
