"""What a client's command writes and reads while it runs, between the client's connection and the relay: credit is
granted as the client reads, and asked of it as hosts take its input."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from controller import api
from protocol import ranks
from protocol.commands import Input
from protocol.feeding import Feeding, InputWindow, Shelf
from protocol.flow import Inflow, Window, nobody_reads
from protocol.messages import Grant
from protocol.outcomes import Exited, Fold, Killed, TimedOut
from protocol.ranks import Ranks

#: An outcome that came before the last of its output waits for as long as that comes, or waits for the client. Where
#: nothing came for so long, in s, it is told without the rest: an agent that lost its relay is back in 3.
_NOTHING_WITHIN = 4.0


#: An outcome on record: its number there, and the hosts that are meant, packed.
Recorded: TypeAlias = tuple[int, bytes]


class Streaming:
    """One command whose output is streamed to one client."""

    def __init__(
        self,
        hosts: Iterable[int],
        first: int,
        window: Window,
        *,
        grant: Callable[[tuple[Grant, ...]], None],
        tell: Callable[[Iterable[Recorded]], None],
    ) -> None:
        """`grant` sends grants to hosts; `tell` takes outcomes that had to wait for their output. `first` is what
        each host may send unasked, `window` what is shared with other commands."""
        self._left = set(hosts)
        self._flow = Inflow(self._left, first, window)
        self._grant, self._tell = grant, tell
        self._loop = asyncio.get_running_loop()
        self._flushing = False
        #: Outcomes without their output, and their numbers on record.
        self._held: list[tuple[Fold, int]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._unread = False
        #: Called when nothing is waited for any more.
        self._then: Callable[[], None] | None = None

    def arrived(self, rank: int, stream: int, offset: int, data: bytes, has: int = 0, *, fast: bool = False) -> bytes:
        """A piece came; what of it the client is to get. `passed_on` is to be called then."""
        if self._unread:
            self._grant(nobody_reads([rank]))
            return b""
        fresh = self._flow.arrived(rank, stream, offset, data, has, fast=fast)
        self._flush_soon()
        return fresh

    def passed_on(self) -> None:
        """The client was told the piece: it may be the last that an outcome waited for."""
        if self._held:
            self._release(anyway=ranks.NONE)

    def read(self, rank: int, count: int) -> None:
        """The client has taken so many bytes of a host's output."""
        self._flow.read(rank, count)
        self._flush_soon()

    def unread(self) -> None:
        """There is no client any more."""
        if not self._unread:
            self._unread = True
            self._flow.close()
            self._grant(nobody_reads(sorted(self._left)))
            self._release(anyway=ranks.union(self._held_ranks()))

    def _flush_soon(self) -> None:
        # Many pieces are taken in one turn of the event loop: one message for all.
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        grants = self._flow.grants()
        if grants and not self._unread:
            self._grant(grants)

    def outcomes(self, folds: Sequence[Fold], rows: Sequence[int]) -> list[Recorded]:
        """Outcomes came, and are on record under these numbers; those of hosts of which all output is there. The others
        are told later."""
        for fold in folds:
            for rank in ranks.each(ranks.unpack(fold.ranks)):
                self._flow.ended(rank, fold.output.out_total, fold.output.err_total)
        ready: list[Recorded] = []
        for fold, row in zip(folds, rows, strict=True):
            ready += self._complete(fold, row, ranks.unpack(fold.ranks) if self._unread else ranks.NONE)
        if self._held and self._timer is None:
            self._look_later()
        return ready

    def _look_later(self) -> None:
        """Look again whether the hosts of the outcomes that are held have sent anything."""
        before = {rank: self._flow.progress(rank) for rank in self._held_ranks()}

        def look() -> None:
            self._timer = None
            stuck = ranks.NONE
            for rank in self._held_ranks():
                if before.get(rank) == self._flow.progress(rank) and not self._flow.waits(rank):
                    stuck |= ranks.only(rank)
            self._release(anyway=stuck)
            if self._held:
                self._look_later()

        self._timer = self._loop.call_later(_NOTHING_WITHIN, look)

    def _held_ranks(self) -> list[int]:
        return [rank for fold, _ in self._held for rank in ranks.each(ranks.unpack(fold.ranks))]

    def _complete(self, fold: Fold, row: int, anyway: Ranks) -> list[Recorded]:
        """What of it is to be told now: of hosts of which all output is there, and of those in `anyway`."""
        if not isinstance(fold.outcome, Exited | Killed | TimedOut):
            # Of what was cancelled or lost nobody waits for the rest.
            anyway = ranks.unpack(fold.ranks)
        whole: Ranks = ranks.NONE
        rest: Ranks = ranks.NONE
        for rank in ranks.each(ranks.unpack(fold.ranks)):
            if ranks.holds(anyway, rank) or self._flow.complete(rank):
                whole |= ranks.only(rank)
                self._flow.over(rank)
                self._left.discard(rank)
            else:
                rest |= ranks.only(rank)
        if rest:
            self._held.append((Fold(ranks.pack(rest), fold.outcome), row))
        return [(row, ranks.pack(whole))] if whole else []

    def _release(self, *, anyway: Ranks) -> None:
        held, self._held = self._held, []
        ready = [part for fold, row in held for part in self._complete(fold, row, anyway)]
        if ready:
            self._tell(ready)
        if not self._held:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._then is not None:
                then, self._then = self._then, None
                then()

    def when_told(self, then: Callable[[], None]) -> None:
        """Call `then` once every outcome was told."""
        self._then = then
        if not self._held:
            self._release(anyway=ranks.NONE)


class Sending:
    """The standard input of one command, from its client to its hosts."""

    def __init__(
        self,
        of: int,
        hosts: Iterable[int],
        window: InputWindow,
        shelf: Shelf,
        *,
        give: Callable[[Ranks, Input], None],
        room: Callable[[int], None],
        broken: Callable[[OSError], None],
    ) -> None:
        """`give` signs and sends a piece; `room` tells the client up to which offset it may send; `broken` is called
        once, where what was put on the `shelf` can't be read: nothing is sent and nothing asked for any more. `window`
        is shared with other commands."""
        self._of = of
        self._feeding = Feeding(hosts, window, shelf)
        self.close = self._feeding.close
        self._give, self._room, self._broken = give, room, broken
        self._told = 0
        #: Hosts still answer: none of it may read the shelf again, and end the command once more.
        self._is_broken = False
        self.tell_room()

    def add(self, data: bytes, *, last: bool) -> None:
        """The client sent more. Raises BadFrame where it may not."""
        if not self._feeding.add(data, last=last):
            raise api.BadFrame("it sent more input than it was asked for")
        self._pump()

    def taken(self, rank: int, count: int, *, is_open: bool, anew: bool) -> None:
        """A host has read so much."""
        self._feeding.taken(rank, count, is_open=is_open, anew=anew)
        self._pump()

    def over(self, folds: Iterable[Fold]) -> None:
        """These hosts have their outcome."""
        for fold in folds:
            for rank in ranks.each(ranks.unpack(fold.ranks)):
                self._feeding.over(rank)
        self._pump()

    def _pump(self) -> None:
        if self._is_broken:
            return
        try:
            for who, offset, data, last in self._feeding.pieces():
                self._give(ranks.union(who), Input(of=self._of, offset=offset, data=data, last=last))
        except OSError as error:
            self._is_broken = True
            self._broken(error)
            return
        self.tell_room()

    def tell_room(self) -> None:
        """Let the client send as much as there is room for."""
        if self._feeding.room > self._told:
            self._told = self._feeding.room
            self._room(self._told)
