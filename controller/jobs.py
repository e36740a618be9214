"""A client's command while it runs: one command of the tree, or one for each host, and the replies that come of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable

import msgspec

from controller import api
from controller.job_records import NOT_PULLED
from controller.replies import Replies
from controller.streaming import Sending, Streaming
from protocol import ranks
from protocol.commands import (
    Body,
    CreateVms,
    DestroyVms,
    Images,
    MoveVm,
    Offer,
    ProbeVms,
    ReceiveVm,
    Send,
    SettleMove,
    VmAction,
)
from protocol.outcomes import NO_OUTPUT, Exited, Fold
from protocol.vms import ImageResult, VmResult

#: What a fold becomes for the client.
Translate = Callable[[Fold], Iterable[api.Reply]]


def as_folded(fold: Fold) -> Iterable[api.Reply]:
    """An outcome as it is."""
    return (api.Folded(folds=(fold,)),)


def as_vms_done(name: Callable[[int], str]) -> Translate:
    """The answers of hosts that made or removed VMs; outcomes of those that could not stay outcomes."""

    def translate(fold: Fold) -> Iterable[api.Reply]:
        if isinstance(fold.outcome, Exited) and fold.output.out:
            results = tuple(msgspec.msgpack.decode(fold.output.out, type=list[VmResult]))
            return [api.VmsDone(host=name(rank), results=results) for rank in ranks.each(ranks.unpack(fold.ranks))]
        return as_folded(fold)

    return translate


def as_vms_reached(name: Callable[[int], str]) -> Translate:
    """The answers of hosts that pinged their VMs."""

    def translate(fold: Fold) -> Iterable[api.Reply]:
        if isinstance(fold.outcome, Exited):
            names = tuple(msgspec.msgpack.decode(fold.output.out, type=list[str])) if fold.output.out else ()
            return [api.VmsReached(host=name(rank), names=names) for rank in ranks.each(ranks.unpack(fold.ranks))]
        return as_folded(fold)

    return translate


def as_images_done(name: Callable[[int], str]) -> Translate:
    """The answers of hosts about their images."""

    def translate(fold: Fold) -> Iterable[api.Reply]:
        if isinstance(fold.outcome, Exited) and fold.output.out:
            results = tuple(msgspec.msgpack.decode(fold.output.out, type=list[ImageResult]))
            return [api.ImagesDone(host=name(rank), results=results) for rank in ranks.each(ranks.unpack(fold.ranks))]
        return as_folded(fold)

    return translate


def as_awaiting(fold: Fold) -> Iterable[api.Reply]:
    """Where hosts await a VM: what they said of it is for the service alone."""
    if isinstance(fold.outcome, Exited):
        fold = Fold(fold.ranks, fold.outcome)
    return as_folded(fold)


def as_not_pulled(fold: Fold) -> Iterable[api.Reply]:
    """What hosts had for a pull that is over since its service ended."""
    return as_folded(Fold(fold.ranks, NOT_PULLED) if isinstance(fold.outcome, Exited) else fold)


def translation(body: Body, name: Callable[[int], str]) -> Translate:
    """How the outcomes of such a command are told to clients."""
    if isinstance(body, CreateVms | DestroyVms | VmAction | MoveVm | SettleMove):
        return as_vms_done(name)
    if isinstance(body, Images):
        return as_images_done(name)
    if isinstance(body, Send):
        return lambda _: ()
    if isinstance(body, Offer):
        return as_not_pulled
    if isinstance(body, ReceiveVm):
        return as_awaiting
    return as_vms_reached(name) if isinstance(body, ProbeVms) else as_folded


def translated(translate: Translate, again: Callable[[], Fold]) -> Callable[[], Iterable[api.Reply]]:
    """What `translate` makes of an outcome that is read when it is wanted."""
    return lambda: translate(again())


def as_late(translate: Translate) -> Translate:
    """What hosts answered after they were lost. What they said of their VMs is for programs, and left out."""
    plain = translate is as_folded

    def late(fold: Fold) -> Iterable[api.Reply]:
        return (api.Late(folds=(fold if plain else msgspec.structs.replace(fold, output=NO_OUTPUT),)),)

    return late


class Job:
    """One client's request. `replies` is what the client that began it is sent, in order; None ends it.

    Others may listen as well, from any moment on: see `listen`.
    """

    def __init__(self, translate: Translate = as_folded) -> None:
        self.replies = Replies()
        self._listeners = [self.replies]
        self.ids: set[int] = set()
        self.open: set[int] = set()
        #: Called when all outcomes are there and before the client hears that they are.
        self.at_end: Callable[[], Awaitable[None]] | None = None
        self._translate = translate
        self._heard: list[Callable[[Fold], None]] = []
        self.sealed = False
        #: Called when all that was begun is over; whether it began more (see `controller.rolling`).
        self.more: Callable[[], bool] | None = None
        #: Somebody wants it to end; called when they say so.
        self.stopped = False
        self.on_stop: Callable[[], None] = lambda: None
        #: What the client that began it is to read, and what it sends.
        self.streams: list[Streaming] = []
        self.sending: Sending | None = None

    def began(self, id_: int) -> None:
        """A command of the tree is part of this job."""
        self.ids.add(id_)
        self.open.add(id_)

    def seal(self) -> None:
        """No more commands will be part of it."""
        self.sealed = True
        self._perhaps_end()

    def also(self, heard: Callable[[Fold], None]) -> None:
        """Call this for each outcome that comes from now on."""
        self._heard.append(heard)

    def folds(self, folds: Iterable[Fold]) -> None:
        """Outcomes came."""
        for fold in folds:
            self.fold(fold)

    def fold(self, fold: Fold, again: Callable[[], Fold] | None = None) -> None:
        """An outcome came; `again` reads it from the record, for clients that are behind."""
        for heard in self._heard:
            heard(fold)
        self._put(self._translate, fold, again)

    def late(self, fold: Fold, again: Callable[[], Fold]) -> None:
        """Hosts answered that were settled as lost; `again` as in `fold`."""
        self._put(as_late(self._translate), fold, again)

    def _put(self, translate: Translate, fold: Fold, again: Callable[[], Fold] | None) -> None:
        replies, size = tuple(translate(fold)), len(fold.output.out) + len(fold.output.err)
        anew = None if again is None else translated(translate, again)
        for listener in self._listeners:
            listener.put_outcome(replies, size, anew)

    def say(self, reply: api.Reply | None) -> None:
        """Tell whoever listens."""
        for listener in self._listeners:
            listener.put(reply)

    def listen(self) -> Replies:
        """One more queue of replies, from now on."""
        queue = Replies()
        self._listeners.append(queue)
        return queue

    def ignore(self, queue: Replies) -> None:
        """Nobody reads that queue any more."""
        if queue in self._listeners:
            self._listeners.remove(queue)
        if queue is self.replies:
            for stream in self.streams:
                stream.unread()

    def tell_client(self, reply: api.Reply) -> None:
        """Tell the client that began it, and nobody else."""
        if self.replies in self._listeners:
            self.replies.put(reply)

    def read(self, piece: api.Streamed) -> None:
        """The client that began it has taken this piece."""
        for stream in self.streams:
            stream.read(piece.rank, len(piece.data))

    def settled(self, id_: int) -> None:
        """One of its commands has all its outcomes."""
        self.open.discard(id_)
        self._perhaps_end()

    def _perhaps_end(self) -> None:
        if self.sealed and not self.open:
            if self.more is not None and self.more():
                return
            self.sealed = False  # once
            task = asyncio.get_running_loop().create_task(self._end())
            task.add_done_callback(lambda done: None if done.cancelled() else done.exception())

    async def _end(self) -> None:
        try:
            if self.at_end is not None:
                await self.at_end()
        finally:
            self.say(api.Settled())
            self.say(None)
