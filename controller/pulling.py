"""`ctl pull` at the service: every host says what it has, and each distinct content is fetched from one that has it.

Hosts open a link of their own to the service for it (see agent.pulls), which listens for them while the pull lasts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from agent.incoming import Incoming
from agent.links import Downlink
from agent.paths import BadDestination, open_folder
from agent.ports import free_ports
from agent.pulls import names_of
from agent.pushes import sentence
from agent.staging import trim
from agent.walk import BadSource
from controller import api
from controller.fetching import Failed, Fetch, Unwritable
from controller.jobs import Job, as_folded
from controller.node import RootNode
from controller.progress import size_text
from controller.status import CtlError, ExitStatus
from protocol import ranks
from protocol.commands import Offer, Offered, Send, Stream
from protocol.outcomes import Cancelled, Exited, FailedToStart, Fold, Outcome, Output, describe
from protocol.ranks import Ranks

#: Hosts that are fetched from at a time: each has a few megabytes in memory here.
_AT_A_TIME = 16


class Pulling:
    """Begins pulls. `notes` is where the notes of staging directories are; `listen` the address to listen at."""

    def __init__(self, node: RootNode, listen: str, notes: Path) -> None:
        self._node, self._listen, self._notes = node, listen, notes
        #: The pulls that go on, by their numbers.
        self.live: dict[int, Job] = {}

    def pull(self, request: api.PullFrom, hosts: dict[int, str], uid: int) -> Job:
        """Begin. Raises CtlError."""
        try:
            names_of(request.paths)
        except BadSource as error:
            raise CtlError(f"nothing was pulled: {error}", ExitStatus.USAGE) from error
        odd = [name for name in hosts.values() if "/" in name or name in (".", "..")]
        if odd:
            raise CtlError(f"{odd[0]!r} can't be the name of a folder", ExitStatus.USAGE)
        self._notes.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._node.loop.run_in_executor(None, trim, self._notes)  # what a service that was killed left
        job = _Pull(self._node, request, hosts, listen=self._listen, notes=self._notes, uid=uid).job
        number = min(job.ids)
        self.live[number] = job

        async def over() -> None:
            del self.live[number]

        job.at_end = over
        return job


class _Pull:
    """One pull."""

    def __init__(
        self, node: RootNode, request: api.PullFrom, hosts: dict[int, str], *, listen: str, notes: Path, uid: int
    ) -> None:
        self._node, self._listen, self._notes = node, listen, notes
        self._request, self._hosts, self._uid = request, hosts, uid
        #: Who has each content, as far as they have said so.
        self._offered: dict[Offered, Ranks] = {}
        self._fetches: dict[int, Fetch] = {}
        self._total = 0
        #: Whose folders were made for this.
        self._made: set[int] = set()
        self._sends: set[Job] = set()
        self._task: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pull")
        self._turns = asyncio.Semaphore(_AT_A_TIME)
        self._link: Downlink | None = None
        self._port = 0
        self._what = msgspec.json.encode(["pull", *request.paths, request.directory]).decode()
        self.job = Job(self._on_offer)
        self.job.more = self._begin
        self.job.on_stop = self._stop
        self._offer = node.give(
            self.job, hosts, Offer(paths=request.paths, wishes=request.wishes), uid=uid, what=self._what
        )
        self.job.seal()

    def _on_offer(self, fold: Fold) -> list[api.Reply]:
        if isinstance(fold.outcome, Exited) and self._task is None:
            try:
                offered = msgspec.msgpack.decode(fold.output.out, type=Offered)
            except msgspec.DecodeError:
                odd = Fold(fold.ranks, FailedToStart("it answered with something else than what it has"))
                self._node.state.put_pulled(min(self.job.ids), odd)
                return list(as_folded(odd))
            self._offered[offered] = self._offered.get(offered, ranks.NONE) | ranks.unpack(fold.ranks)
            return []
        return list(as_folded(fold))

    def _begin(self) -> bool:
        """All have said what they have."""
        self.job.more = None
        if self._offered:
            self._task = self._node.loop.create_task(self._all())
            self._task.add_done_callback(self._over)
        return bool(self._offered)

    def _over(self, task: asyncio.Task[None]) -> None:
        if self._link is not None:
            self._link.close()
        self._threads.shutdown(wait=False)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            rest = ranks.NONE
            for who in self._offered.values():
                rest |= who
            self._say(rest, FailedToStart(sentence(error)))
        self.job.seal()

    def _stop(self) -> None:
        for send in list(self._sends):
            self._node.cancel(send)
        for fetch in list(self._fetches.values()):
            fetch.fail(Failed("cancelled"))

    def _say(self, who: Ranks, outcome: Outcome, out: str = "") -> None:
        """Who was said to have it has its outcome now."""
        for offered in list(self._offered):
            self._offered[offered] &= ~who
        if who:
            fold = Fold(ranks.pack(who), outcome, Output(out=out.encode()))
            self._node.state.put_pulled(self._offer, fold)
            self.job.folds([fold])

    # --- fetching -----------------------------------------------------------------------------------------------------

    async def _all(self) -> None:
        (self._port,) = free_ports(self._listen, 1)
        self._link = self._node.shell.listen(self._listen, self._port, heard=self._heard, lost=self._lost)
        self._total = sum(offered.size for offered in self._offered)
        self.job.say(api.Fetched(size=self._total, done={}))
        await asyncio.gather(*(self._content(offered, who) for offered, who in list(self._offered.items())))

    def _heard(self, rank: int, frames: list[bytes]) -> None:
        fetch = self._fetches.get(rank)
        if fetch is not None:
            fetch.heard(frames)
        elif self._link is not None:
            self._link.drop(rank, penalty=False)  # nobody has asked it for anything

    def _lost(self, rank: int, why: str) -> None:
        fetch = self._fetches.get(rank)
        if fetch is not None:
            fetch.fail(Failed(f"its link broke: {why}"))

    async def _content(self, offered: Offered, who: Ranks) -> None:
        """Fetch one content from one of those who have it, and give all of them their outcome."""
        why: Outcome = FailedToStart("nobody had it")
        for rank in ranks.each(who):
            if self.job.stopped:
                why = Cancelled(ran=True)
                break
            async with self._turns:
                try:
                    stream, listing = await self._from(rank, offered)
                except Failed as error:
                    why = FailedToStart(f"it can't be pulled from {self._hosts[rank]}: {error}")
                    continue
                except Unwritable as error:
                    why = FailedToStart(f"it can't be written: {error}")
                    break
            await self._spread(rank, offered, who, partial(self._twin, rank, stream, listing))
            return
        self._say(who, Cancelled(ran=True) if self.job.stopped else why)

    async def _from(self, rank: int, offered: Offered) -> tuple[Stream, bytes]:
        """Fetch from one host into its own folder; the stream and its listing. Raises Failed, Unwritable."""
        node, link = self._node, self._link
        assert link is not None  # noqa: S101
        job = Job(lambda _: [])
        job.ids.update(self.job.ids)

        def ended(fold: Fold) -> None:
            # The link tells it too, but not where the host is lost or would not even begin.
            fetch.fail(Failed(describe(fold.outcome)))

        job.also(ended)
        fetch = Fetch(
            self._offer,
            offered,
            send=lambda frames: link.send(rank, frames),
            make=lambda stream, listing: self._store(rank, stream, listing),
            on_thread=self._on_thread,
            advanced=lambda done: self.job.say(api.Fetched(size=self._total, done={rank: done})),
            compress=self._request.wishes.compress,
        )
        self._fetches[rank] = fetch
        self._sends.add(job)
        try:
            node.give(job, [rank], Send(of=self._offer, port=self._port), uid=self._uid, what=self._what)
            job.seal()
            store = await fetch.result
            assert isinstance(store, Incoming)  # noqa: S101
            await self._on_thread(store.close)
            return store.stream, store.listing
        except (Failed, Unwritable):
            kept = fetch.store
            if isinstance(kept, Incoming):
                await self._on_thread(kept.close)
            await self._on_thread(partial(self._unmake, rank))
            raise
        finally:
            del self._fetches[rank]
            self._sends.discard(job)
            link.drop(rank, penalty=False)

    def _on_thread(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        return self._node.loop.run_in_executor(self._threads, work)

    # --- files --------------------------------------------------------------------------------------------------------

    def _folder(self, rank: int) -> str:
        return os.path.join(self._request.directory, self._hosts[rank])  # noqa: PTH118  a host's folder

    def _store(self, rank: int, stream: Stream, listing: bytes | None) -> Incoming:
        """Where a host's files go. Blocks."""
        folder = self._folder(rank)
        if not Path(folder).exists():
            self._made.add(rank)
        Path(folder).mkdir(parents=True, exist_ok=True)
        return self._incoming(folder, stream, listing)

    def _unmake(self, rank: int) -> None:
        """A folder that was made for what did not come goes again, if nothing is in it. Blocks."""
        if rank in self._made:
            with suppress(OSError):
                Path(self._folder(rank)).rmdir()

    def _incoming(self, folder: str, stream: Stream, listing: bytes | None) -> Incoming:
        # A host may be in an enemy's hands: it names what it was asked for and nothing else.
        only = frozenset(name for name, _ in names_of(self._request.paths))
        exact = self._request.wishes.preserve
        return Incoming(folder, stream, listing, self._notes, exact=exact, only=only)

    async def _spread(self, first: int, offered: Offered, who: Ranks, twin: Callable[[int], None]) -> None:
        """Those who have the same get the same files by `twin`, or with `fold` are named beside them."""
        out = f"pulled {size_text(offered.size)}"
        if self._request.fold:
            hosts = "".join(f"{self._hosts[rank]}\n" for rank in ranks.each(who))
            file = Path(self._request.directory, f"{self._hosts[first]}.hosts")
            try:
                await self._on_thread(lambda: file.write_text(hosts))
            except OSError as error:
                self._say(who, FailedToStart(sentence(error)))
                return
            self._say(who, Exited(0), out)
            return
        self._say(ranks.only(first), Exited(0), out)
        done = ranks.NONE
        for rank in ranks.each(who & ~ranks.only(first)):
            try:
                await self._on_thread(partial(twin, rank))
            except (OSError, BadDestination) as error:
                self._say(ranks.only(rank), FailedToStart(sentence(error)))
            else:
                done |= ranks.only(rank)
        self._say(done, Exited(0), out)

    def _twin(self, first: int, stream: Stream, listing: bytes, to: int) -> None:
        """Give a host's folder the files of another's, by hard links. Blocks."""
        folder = self._folder(to)
        Path(folder).mkdir(parents=True, exist_ok=True)
        there = open_folder(self._folder(first))
        try:
            incoming = self._incoming(folder, stream, listing)
            try:
                incoming.take(there)
                incoming.finish()
            finally:
                incoming.close()
        finally:
            os.close(there)
