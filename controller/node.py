"""The root of the tree: the relay with no parent, the fleet's key, its members, and what is known of them."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeGuard

import msgspec

from agent.batches import Batches
from agent.identity import HostDirectory, Identity, Welcome, write_atomically
from agent.links import Keyring
from agent.shell import Shell
from agent.source import Source
from controller import api
from controller.homing import may_go_home
from controller.jobs import Job, translation
from controller.known import Known
from controller.members import Members
from controller.rollcall import RollCalls
from controller.rolling import Roll, Rolling
from controller.sources import Sources
from controller.state import Record, State
from controller.streaming import Recorded, Sending, Streaming
from controller.vm_words import words
from protocol import events, ranks
from protocol.commands import (
    Body,
    Cancel,
    Command,
    CreateVms,
    DestroyVms,
    Feed,
    FetchOutput,
    Leave,
    Push,
    Run,
    Settled,
)
from protocol.flow import InputWindow, Window, nobody_reads
from protocol.limits import DEFAULT_LIFETIME_MS, SETTLED_EVERY
from protocol.messages import Deliver, Grant, Manner
from protocol.outcomes import Cancelled, Exited, Fold, succeeded
from protocol.ranks import Ranks
from protocol.relay import Relay, RootPart
from protocol.stream import Blob
from protocol.transfer import Role
from protocol.trust import SEED_BYTES, Signer, open_command
from protocol.vms import VmSpec

log = logging.getLogger("canopy")

#: Changes of the plan wait this long for more of them: hosts come up in crowds.
_PLAN_WINDOW = 0.05
#: How often the root looks for hosts that hang elsewhere than planned, in seconds.
_TIDY_EVERY = 1.0
#: A host that could not go where it was planned is asked again after this, doubled each time up to the second number.
_TIDY_FIRST, _TIDY_MOST = 2.0, 120.0
#: How often the clock's reading is kept, so that it does not go back where the machine's does between two starts.
_SAVE_CLOCK_EVERY = 60.0
#: Chunks that are read at a time: the first goes out when the last is read.
_READ_MOST = 8
#: Jobs whose history is kept, with their output: at the default budget of 256 KiB a host some megabytes each at most.
_KEEP_JOBS = 1_000
#: Commands whose settling hosts out of reach are still to be told; beyond it they keep outcomes until they restart.
_SETTLE_MOST = 10_000


class RootNode:
    """The root's relay and shell with all that only the root has. Also the shell's worker: it reads the files that
    are pushed, and hears the relay's news."""

    def __init__(self, directory: Path, listen: str, advertised: str | None) -> None:
        """`listen` is the address to listen at (0.0.0.0: all), `advertised` the one that hosts are told."""
        self.loop = asyncio.get_running_loop()
        self.state = State(directory / "state.db")
        self.identity: Identity = HostDirectory(directory / "root").enrol(listen)
        self.fleet = self._fleet_name(directory)
        self.signer = Signer(_seed(directory / "fleet.key"))
        self.members = Members(self.state, self.identity, advertised)
        self.known = Known()
        self.jobs: dict[int, Job] = {}
        self.began = self.loop.time()
        wall_ms = max(time.time_ns() // 1_000_000, int(self.state.meta("clock_ms", "0")))
        self._clock_saved_at = self.loop.time()
        self._clock_offset_ms = wall_ms - round(self.loop.time() * 1000)
        incarnations = self.state.incarnations()
        root = RootPart(self.signer, self.fleet, self.clock_ms, self.members.name, incarnations)
        self.relay = Relay(
            plan=self.members.root_plan(),
            incarnation=0,
            draw=random.SystemRandom().random,
            nonce=lambda: os.urandom(16),
            root=root,
        )
        keyring = Keyring(self.identity.public, self.identity.secret)
        self.shell = Shell(keyring, self.relay, listen, self.identity.control_port, self.identity.bulk_port)
        self.shell.worker = self
        self._reading: dict[int, Batches[int, list[tuple[bytes | None, bytes | None]]]] = {}
        self._sources = Sources(directory / "pushes")
        #: Commands whose output is streamed, or whose input is sent.
        self._outputs: dict[int, tuple[Job, Streaming]] = {}
        self._inputs: dict[int, Sending] = {}
        self._window, self._input_window = Window(), InputWindow()
        self._disk = ThreadPoolExecutor(max_workers=2, thread_name_prefix="disk")
        self._to_settle: dict[int, Ranks] = {}
        self._settle_timer: asyncio.TimerHandle | None = None
        self._plan_timer: asyncio.TimerHandle | None = None
        self._tidy_timer: asyncio.TimerHandle | None = None
        self._tidied: dict[int, tuple[float, float]] = {}
        self._plans: dict[int, tuple[int, int]] = {}
        self._vm_bodies: dict[int, CreateVms | DestroyVms] = {}
        #: Called when hosts have come into the tree or left it.
        self.on_links: list[Callable[[], None]] = []
        #: Called when VMs have come on record or have left it.
        self.on_vms: list[Callable[[], None]] = []
        self._waiters: set[asyncio.Future[None]] = set()
        self.roll_calls = RollCalls(
            self.state.new_id,
            lambda id_, who, body, ttl_ms: self._submit(id_, who, body, Manner.WORK, ttl_ms),
            self.wait_until,
        )

    @staticmethod
    def _fleet_name(directory: Path) -> str:
        file = directory / "fleet.id"
        if not file.exists():
            write_atomically(file, f"{directory.name}-{os.urandom(4).hex()}\n".encode())
        return file.read_text().strip()

    def clock_ms(self, now: float) -> int:
        """The root's clock: milliseconds since 1970, and never less than it once was."""
        return self._clock_offset_ms + round(now * 1000)

    def begin(self) -> None:
        """Start the relay."""
        # Parts of the plan may have changed while nobody could be told: tell all of them that come.
        self.members.stale = dict.fromkeys(self.members.present, self.members.version)
        self.shell.begin()
        self._tidy()

    # --- commands -----------------------------------------------------------------------------------------------------

    def give(
        self,
        job: Job,
        targets: Iterable[int],
        body: Body,
        *,
        timeout_ms: int | None = None,
        uid: int,
        what: str,
        source: Source | None = None,
    ) -> int:
        """Sign a command and give it to the tree as a part of `job`; its number. `source` is what a push
        reads."""
        who = ranks.union(targets)
        id_ = self.state.new_id()
        job.began(id_)
        self.jobs[id_] = job
        manner = Manner.WORK
        if isinstance(body, Push) and source is not None:
            manner = Manner.BULK
            order = self.members.order(ranks.each(who), self.relay.reachable)
            body = msgspec.structs.replace(body, stream=msgspec.structs.replace(body.stream, order=order))
            self._sources.add(id_, source)
            self.shell.begin_transfer(id_, body.stream, Role.SOURCE)
        if isinstance(body, CreateVms | DestroyVms):
            self._vm_bodies[id_] = body
        if streams(body):
            body = msgspec.structs.replace(body, first=self._window.first(ranks.count(who)))
        delivery = self._delivery(id_, who, body, manner, timeout_ms)
        now_ms = self.clock_ms(self.loop.time())
        self.state.command_begins(
            Record(
                id=id_,
                job=min(job.ids),
                uid=uid,
                what=what,
                delivery=delivery,
                issued_ms=now_ms,
                deadline_ms=None if timeout_ms is None else now_ms + timeout_ms,
                settled_ms=None,
            )
        )
        if streams(body):
            job.streams.append(self._stream(job, id_, delivery.targets, body.first))
        if isinstance(body, Run) and body.feed:
            self._inputs[id_] = job.sending = Sending(
                id_,
                ranks.each(who),
                self._input_window,
                give=lambda some, piece: self._submit(self.state.new_id(), some, piece, Manner.QUIET, None),
                room=lambda upto: job.tell_client(api.InputRoom(upto=upto)),
            )
        self.shell.feed(events.Submit(delivery, body))
        return id_

    def withhold(self, job: Job, who: Ranks, body: Body, *, uid: int, what: str) -> None:
        """Put on record that these hosts were never given the command, and tell the job."""
        id_, now_ms = self.state.new_id(), self.clock_ms(self.loop.time())
        delivery = self._delivery(id_, who, body, Manner.WORK, None)
        fold = Fold(ranks.pack(who), Cancelled(ran=False))
        self.state.command_begins(
            Record(
                id=id_,
                job=min(job.ids),
                uid=uid,
                what=what,
                delivery=delivery,
                issued_ms=now_ms,
                deadline_ms=None,
                settled_ms=None,
            )
        )
        self.state.command_outcomes(id_, [fold])
        self.state.command_settles(id_, now_ms)
        job.folds([fold])

    def roll(self, roll: Roll, job: Job) -> None:
        """Begin rolling work, or go on with it."""
        job.ids.add(roll.job)
        begun = failed = ranks.NONE
        for record in self.state.commands_of(roll.job):
            begun |= ranks.unpack(record.delivery.targets)
            for fold in self.state.outcomes_of(record.id):
                failed |= ranks.NONE if succeeded(fold.outcome) else ranks.unpack(fold.ranks)

        def give(who: Ranks) -> None:
            self.give(job, ranks.each(who), roll.body, timeout_ms=roll.timeout_ms, uid=roll.uid, what=roll.what)

        Rolling(
            job,
            roll,
            begun=begun,
            failed=failed,
            give=give,
            withhold=lambda who: self.withhold(job, who, roll.body, uid=roll.uid, what=roll.what),
            done=lambda: self.state.drop_roll(roll.job),
        ).begin()

    def resume(self) -> None:
        """Take up the commands that were given before this service began and are not settled."""
        reborn: dict[int, Job] = {}
        starts = self.state.starts()
        for record in self.state.open_commands():
            delivery = record.delivery
            body = open_command(delivery.payload, delivery.signature, self.signer.verify_key, self.fleet).body
            job = reborn.setdefault(record.job, Job(translation(body, self.members.name)))
            job.began(record.id)
            self.jobs[record.id] = job
            if isinstance(body, CreateVms | DestroyVms):
                self._vm_bodies[record.id] = body
            missing = ranks.unpack(delivery.targets)
            for fold in self.state.outcomes_of(record.id):
                missing &= ~ranks.unpack(fold.ranks)
            if delivery.manner is Manner.BULK and isinstance(body, Push):
                try:
                    self._sources.load(record.id, body.stream)
                    self.shell.begin_transfer(record.id, body.stream, Role.SOURCE)
                except OSError as error:
                    log.warning("push %d can't go on: %s", record.id, error)
            now = self.loop.time()
            ttl = None if record.deadline_ms is None else max(0, record.deadline_ms - self.clock_ms(now))
            anew = missing & ranks.union(rank for rank, latest in starts.items() if latest >= record.id)
            self.shell.feed(events.Submit(msgspec.structs.replace(delivery, ttl_ms=ttl), body, missing, anew))
            if streams(body):
                # Its client went with the old service.
                self._stream(job, record.id, delivery.targets, body.first).unread()
            if isinstance(body, Run) and body.feed:
                self.cancel(job)  # the rest of its input is gone, and half of one must not pass for the whole
        for roll in self.state.rolls():
            self.roll(roll, reborn.pop(roll.job) if roll.job in reborn else Job())
        self._sources.prune({id_ for id_ in self.jobs if id_ in self._sources})
        for job in reborn.values():
            job.seal()

    def _submit(self, id_: int, who: Ranks, body: Body, manner: Manner, ttl_ms: int | None) -> None:
        self.shell.feed(events.Submit(self._delivery(id_, who, body, manner, ttl_ms), body))

    def _delivery(self, id_: int, who: Ranks, body: Body, manner: Manner, ttl_ms: int | None) -> Deliver:
        payload, signature = self._sign(id_, who, body)
        return Deliver(id_, ranks.pack(who), ttl_ms, manner, payload, signature)

    def _sign(self, id_: int, who: Ranks, body: Body) -> tuple[bytes, bytes]:
        now_ms = self.clock_ms(self.loop.time())
        return self.signer.command(
            Command(
                fleet=self.fleet,
                id=id_,
                targets=ranks.pack(who),
                issued_ms=now_ms,
                expires_ms=now_ms + DEFAULT_LIFETIME_MS,
                body=body,
            )
        )

    def cancel(self, job: Job) -> None:
        """Stop what of a job still runs, everywhere, and begin no more of it."""
        if job.more is not None and not job.stopped:
            self.state.stop_roll(min(job.ids))
        job.stopped = True
        job.on_stop()
        for id_ in sorted(job.open):
            missing = self.relay.missing(id_)
            if missing:
                self._submit(self.state.new_id(), missing, Cancel(of=id_), Manner.QUIET, None)

    def feed(self, job: Job, offset: int, data: bytes, seen: int, *, again: bool) -> None:
        """What was typed into the console that a job is, and what was seen of it."""
        for id_ in job.open:
            missing = self.relay.missing(id_)
            if missing:
                body = Feed(of=id_, offset=offset, data=data, seen=seen, again=again)
                self._submit(self.state.new_id(), missing, body, Manner.QUIET, None)

    def tell(self, effect: events.Effect) -> None:
        """The relay's news."""
        now = self.loop.time()
        match effect:
            case events.Tell(id_, folds):
                if id_ in self._plans:
                    self._plan_answered(id_, all_well=all(fold.outcome == Exited(0) for fold in folds))
                    return
                if id_ in self.roll_calls:
                    self._roll_called(id_, folds)
                    return
                self._outcomes(id_, folds)
            case events.TellLate(id_, folds):
                self._answered_late(id_, folds)
            case events.TellSettled(id_):
                self._settled(id_, now)
            case events.TellStream(id_, rank, stream, offset, data):
                self._streamed(id_, rank, stream, offset, data)
            case events.TellTaken(id_, rank, taken, is_open, anew):
                if id_ in self._inputs:
                    self._inputs[id_].taken(rank, taken, is_open=is_open, anew=anew)
            case events.TellProgress(id_, done, left):
                pushed = self._sources.stream(id_)
                if id_ in self.jobs and pushed is not None:
                    self.jobs[id_].say(api.Advanced(size=pushed.size, done=dict(done), left=left))
            case events.TellReports(reports):
                self.known.reports(reports, now)
            case events.TellLinks(links):
                self.known.links(links, now)
                self.state.put_incarnations({link.rank: link.incarnation for link in links})
                if any(link.up for link in links):
                    # Hosts below one that came back make no news of their own.
                    if any(ranks.holds(self.relay.reachable, rank) for rank in self.members.stale):
                        self.plan_soon()
                    self._settle_soon()
                self._wake()
                for listener in self.on_links:
                    listener()
            case _:
                raise TypeError(f"the root can't {effect}")

    def specs_under_way(self) -> list[VmSpec]:
        """What hosts are being asked to make now."""
        return [spec for body in self._vm_bodies.values() if isinstance(body, CreateVms) for spec in body.specs]

    def vms_changed(self) -> None:
        """VMs came on record, or left it."""
        for listener in self.on_vms:
            listener()

    def _roll_called(self, id_: int, folds: Iterable[Fold]) -> None:
        self.roll_calls.heard(id_, folds)
        for fold in folds:
            self._to_settle[id_] = self._to_settle.get(id_, ranks.NONE) | ranks.unpack(fold.ranks)
        self._wake()

    def _wake(self) -> None:
        """Have everybody who waits look again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _answered_late(self, id_: int, folds: Iterable[Fold]) -> None:
        """Hosts answered that are settled: as lost, which then stays and has the answer beside it, or otherwise."""
        late = self.state.late_outcomes(id_, folds)
        for fold in late:
            self._to_settle[id_] = self._to_settle.get(id_, ranks.NONE) | ranks.unpack(fold.ranks)
        if late and id_ in self.jobs:
            self.jobs[id_].late(late)
        self._settle_soon()

    def _outcomes(self, id_: int, folds: tuple[Fold, ...]) -> None:
        made, gone = words(self._vm_bodies.get(id_), folds, self.members.name)
        rows = self.state.command_outcomes(id_, folds, made=made, gone=gone)
        for deployment, vm, _ in gone:
            self.known.vms.pop((deployment, vm), None)
        if gone:
            self.vms_changed()
        for fold in folds:
            self._to_settle[id_] = self._to_settle.get(id_, ranks.NONE) | ranks.unpack(fold.ranks)
        if id_ in self._inputs:
            self._inputs[id_].over(folds)
        if id_ in self.jobs:
            job, output = self.jobs[id_], self._outputs.get(id_)
            if output is not None:
                self._tell_recorded(job, output[1].outcomes(folds, rows))
                return
            for fold, row in zip(folds, rows, strict=True):
                job.fold(fold, partial(self.state.outcome, row))

    def _tell_recorded(self, job: Job, outcomes: Iterable[Recorded]) -> None:
        """Tell a job outcomes that are on record, each for some of its hosts."""

        def read(row: int, who: bytes) -> Fold:
            return msgspec.structs.replace(self.state.outcome(row), ranks=who)

        for row, who in outcomes:
            job.fold(read(row, who), partial(read, row, who))

    def _settled(self, id_: int, now: float) -> None:
        if self._plans.pop(id_, None) is not None:
            return
        if self.roll_calls.settled(id_):
            self._settle_soon()
            return
        self.state.command_settles(id_, self.clock_ms(now))
        job = self.jobs.pop(id_, None)
        self._vm_bodies.pop(id_, None)
        if id_ in self._inputs:
            self._inputs.pop(id_).close()
        if id_ in self._sources:
            self.shell.end_transfer(id_)
            self._reading.pop(id_, None)
            self._disk.submit(self._sources.drop(id_).close)
        self._to_settle.setdefault(id_, ranks.NONE)
        self._settle_soon()
        if id_ in self._outputs:
            self._outputs[id_][1].when_told(lambda: self._told(id_))
        elif job is not None:
            job.settled(id_)

    def _stream(self, job: Job, id_: int, targets: bytes, first: int) -> Streaming:
        streaming = Streaming(
            ranks.each(ranks.unpack(targets)),
            first,
            self._window,
            grant=lambda grants: self.shell.feed(events.Grants(id_, grants)),
            tell=partial(self._tell_recorded, job),
        )
        self._outputs[id_] = job, streaming
        return streaming

    def _told(self, id_: int) -> None:
        """The client has all outcomes of a streamed command, each after its output."""
        job, _ = self._outputs.pop(id_)
        self._settle_soon()
        job.settled(id_)

    def _streamed(self, id_: int, rank: int, stream: int, offset: int, data: bytes) -> None:
        """A piece of a command's output came."""
        if id_ not in self._outputs:
            if id_ in self.jobs:  # a console's, which has a window of its own
                self.jobs[id_].say(api.Streamed(rank=rank, stream=stream, offset=offset, data=data))
            else:
                self.shell.feed(events.Grants(id_, nobody_reads([rank])))
            return
        job, streaming = self._outputs[id_]
        fresh = streaming.arrived(rank, stream, offset, data)
        if fresh:
            begin = offset + len(data) - len(fresh)
            job.tell_client(api.Streamed(rank=rank, stream=stream, offset=begin, data=fresh))

    def tell_settled(self) -> None:
        """Tell agents which outcomes they may forget. Those out of reach are told when they are back."""
        if self._settle_timer is not None:
            self._settle_timer.cancel()
            self._settle_timer = None
        done = {id_: who for id_, who in self._to_settle.items() if id_ not in self.jobs and id_ not in self._outputs}
        if not done:
            return
        self.state.make_durable()
        reachable, present = self.relay.reachable, ranks.union(self.members.present)
        told = ranks.NONE
        for id_, who in done.items():
            told |= who & reachable
            later = who & present & ~reachable
            if later:
                self._to_settle[id_] = later
            else:
                del self._to_settle[id_]
        while len(self._to_settle) > _SETTLE_MOST:
            del self._to_settle[next(iter(self._to_settle))]
        ids = tuple(sorted(id_ for id_, who in done.items() if who & reachable))
        if ids:
            self._submit(self.state.new_id(), told, Settled(ids=ids), Manner.QUIET, None)

    def _settle_soon(self) -> None:
        if self._settle_timer is None and self._to_settle:
            self._settle_timer = self.loop.call_later(SETTLED_EVERY, self.tell_settled)

    # --- the plan -----------------------------------------------------------------------------------------------------

    def welcome(self, rank: int) -> bytes:
        """What a host is given at enrolment."""
        plan = self.members.plan(rank)
        payload, signature = self._sign(self.state.new_id(), ranks.only(rank), plan)
        self.members.stale.pop(rank, None)
        welcome = Welcome(fleet=self.fleet, verify_key=self.signer.verify_key, payload=payload, signature=signature)
        return msgspec.msgpack.encode(welcome)

    def membership_changed(self) -> None:
        """Admit who is to be admitted, and tell the others soon."""
        self.shell.feed(events.Replan(self.members.root_plan()))
        self.plan_soon()

    def plan_soon(self) -> None:
        """Send hosts their new parts of the plan, in a moment."""
        if self._plan_timer is None:
            self._plan_timer = self.loop.call_later(_PLAN_WINDOW, self._send_plans)

    def _send_plans(self) -> None:
        self._plan_timer = None
        reachable = self.relay.reachable
        under_way = dict(self._plans.values())
        # Those above first: they must admit whoever the plans send to them.
        for rank in sorted(self.members.stale, key=lambda rank: (self.members.depth(rank), rank)):
            if not ranks.holds(reachable, rank) or under_way.get(rank, -1) >= self.members.stale[rank]:
                continue
            if rank not in self.members.present:
                del self.members.stale[rank]
                continue
            id_ = self.state.new_id()
            self._plans[id_] = (rank, self.members.version)
            self._submit(id_, ranks.only(rank), self.members.plan(rank), Manner.WORK, None)

    def _plan_answered(self, id_: int, *, all_well: bool) -> None:
        rank, version = self._plans[id_]
        if all_well and self.members.stale.get(rank, version + 1) <= version:
            del self.members.stale[rank]
        elif rank in self.members.stale:
            self.loop.call_later(_TIDY_FIRST, self.plan_soon)
        self._to_settle[id_] = self._to_settle.get(id_, ranks.NONE) | ranks.only(rank)

    def _tidy(self) -> None:
        """Ask hosts that hang elsewhere than planned to go where they were planned, once their parent is there."""
        now, reachable = self.loop.time(), self.relay.reachable
        for rank, host in self.members.present.items():
            link = self.relay.links.get(rank)
            if link is None or not ranks.holds(reachable, rank):
                continue
            if link.parent == host.parent:
                self._tidied.pop(rank, None)
            elif host.parent is None or ranks.holds(reachable, host.parent):
                due, pause = self._tidied.get(rank, (0.0, _TIDY_FIRST))
                linked_at = self.known.linked_at
                if now >= due and (
                    host.parent is None or may_go_home(now, linked_at.get(rank, now), linked_at.get(host.parent, now))
                ):
                    self._tidied[rank] = (now + pause, min(pause * 2, _TIDY_MOST))
                    self.members.renew(rank)
                    self.plan_soon()
        if now >= self._clock_saved_at + _SAVE_CLOCK_EVERY:
            self._clock_saved_at = now
            self.state.set_meta("clock_ms", str(self.clock_ms(now)))
            self.state.prune_jobs(_KEEP_JOBS)
        self._tidy_timer = self.loop.call_later(_TIDY_EVERY, self._tidy)

    # --- waiting ------------------------------------------------------------------------------------------------------

    async def wait_until(self, condition: Callable[[], bool], within: float) -> bool:
        """Wait for a condition on the tree; whether it came true within `within` seconds."""
        deadline = self.loop.time() + within
        while not condition():
            remaining = deadline - self.loop.time()
            if remaining <= 0:
                return False
            waiter: asyncio.Future[None] = self.loop.create_future()
            self._waiters.add(waiter)
            try:
                await asyncio.wait_for(waiter, remaining)
            except TimeoutError:
                pass
            finally:
                self._waiters.discard(waiter)
        return True

    # --- the shell's worker -------------------------------------------------------------------------------------------

    def start(self, id_: int, body: Body, ttl: float | None) -> None:
        """The root does no work of its own."""
        raise TypeError(f"the root was told to {body} (command {id_}, {ttl})")

    def stop(self, id_: int, *, hard: bool) -> None:
        """The root does no work of its own."""
        raise TypeError(f"the root was told to stop command {id_} (hard: {hard})")

    def keep(self, outcome: events.Keep) -> None:
        """The root has no outcomes of its own."""

    def load(self, id_: int, signature: bytes) -> None:
        """The root has no outcomes of its own."""

    def type(self, feed: Feed) -> None:
        """The root has no consoles of its own."""

    def granted(self, id_: int, grant: Grant) -> None:
        """The root grants, it is granted nothing."""

    def pour(self, id_: int, offset: int, data: bytes, *, last: bool) -> None:
        """The root feeds, it is fed nothing."""

    def forget(self, ids: tuple[int, ...]) -> None:
        """The root has no outcomes of its own."""

    def read(self, id_: int, index: int) -> None:
        """A chunk of a file that is being pushed."""

        reading = self._reading.get(id_)
        if reading is None:
            reads, told = partial(self._read, id_), partial(self._was_read, id_)
            reading = self._reading[id_] = Batches(self._disk, reads, told, most=_READ_MOST)
        reading.add(index)

    def _read(self, id_: int, indices: list[int]) -> list[tuple[bytes | None, bytes | None]]:
        """On a thread."""
        return [self._sources.read_or_none(id_, index) for index in indices]

    def _was_read(
        self, id_: int, indices: list[int], read: list[tuple[bytes | None, bytes | None]] | None, _: object
    ) -> None:
        for index, (blob, packed) in zip(indices, read or [(None, None)] * len(indices), strict=True):
            self.shell.was_read(id_, index, blob, packed)

    def store(self, id_: int, index: int, blob: Blob) -> None:
        """The root stores nothing."""

    def headed(self, id_: int) -> None:
        """The root has its files."""

    def complete(self, id_: int) -> None:
        """The root has its files."""

    def broken(self, id_: int, why: str, *, keep: bool) -> None:
        """The root has its files."""

    def arrived(self) -> None:
        """The root attaches to nobody."""

    def depart(self, leave: Leave) -> None:
        """The root does not depart on commands."""

    def save_plan(self, delivery: Deliver) -> None:
        """The root makes the plan."""

    def close(self) -> None:
        """End: sockets, threads, database."""
        for timer in (self._settle_timer, self._plan_timer, self._tidy_timer):
            if timer is not None:
                timer.cancel()
        self.shell.close()
        self._disk.shutdown()
        self.state.set_meta("clock_ms", str(self.clock_ms(self.loop.time())))
        self.state.close()


def streams(body: Body) -> TypeGuard[Run | FetchOutput]:
    """Whether such a command's output is sent as it comes."""
    return isinstance(body, FetchOutput) or (isinstance(body, Run) and body.stream)


def _seed(path: Path) -> bytes:
    """The fleet's signing key, made where there is none. It exists on the service node alone."""
    if not path.exists():
        write_atomically(path, os.urandom(SEED_BYTES))
    return path.read_bytes()
