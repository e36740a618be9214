"""The root of the tree: the relay with no parent, the fleet's key, its members, and what is known of them."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TypeGuard

import msgspec

from agent.identity import HostDirectory, Identity, Welcome, write_atomically
from agent.keyring import Keyring
from agent.shell import Shell
from agent.source import Source
from controller import api
from controller.flows import Flows
from controller.forgetting import Forgetting
from controller.jobs import Job, translation
from controller.known import Known
from controller.members import Members
from controller.planning import Planning
from controller.rollcall import RollCalls
from controller.rolling import Roll, Rolling
from controller.root_worker import RootWorker
from controller.state import Record, State
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
    Push,
    Run,
)
from protocol.limits import DEFAULT_LIFETIME_MS
from protocol.messages import Deliver, Manner
from protocol.outcomes import Cancelled, Fold, succeeded
from protocol.ranks import Ranks
from protocol.relay import Relay, RootPart
from protocol.transfer import Role
from protocol.trust import SEED_BYTES, Signer, open_command
from protocol.vms import VmSpec

log = logging.getLogger("canopy")

#: How often the clock's reading is kept, so that it does not go back where the machine's does between two starts.
_KEEP_HOUSE_EVERY = 60.0
#: Jobs whose history is kept, with their output: at the default budget of 256 KiB a host some megabytes each at most.
_KEEP_JOBS = 1_000


class RootNode:
    """The root's relay and shell with all that only the root has: it hears the relay's news."""

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
        self.shell.worker = self._worker = RootWorker(directory / "pushes", self.shell, self.tell)
        self._flows = Flows(
            directory,
            self.state,
            grant=lambda id_, grants: self.shell.feed(events.Grants(id_, grants)),
            give=lambda id_, who, piece: self._submit(id_, who, piece, Manner.QUIET, None),
        )
        self.forgetting = Forgetting(
            self.state,
            self.members,
            self.relay,
            tell=lambda who, settled: self._submit(self.state.new_id(), who, settled, Manner.QUIET, None),
            goes_on=lambda id_: id_ in self.jobs or id_ in self._flows,
        )
        self.planning = Planning(
            self.members,
            self.known,
            self.relay,
            new_id=self.state.new_id,
            give=lambda id_, rank, plan: self._submit(id_, ranks.only(rank), plan, Manner.WORK, None),
        )
        self._vm_bodies: dict[int, CreateVms | DestroyVms] = {}
        self._house_timer: asyncio.TimerHandle | None = None
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
        self.planning.begin()
        self.shell.begin()
        self._house_timer = self.loop.call_later(_KEEP_HOUSE_EVERY, self._keep_house)

    def _keep_house(self) -> None:
        """Keep the clock's reading, and no more history than is wanted, now and then."""
        self.state.set_meta("clock_ms", str(self.clock_ms(self.loop.time())))
        self.state.prune_jobs(_KEEP_JOBS)
        self._house_timer = self.loop.call_later(_KEEP_HOUSE_EVERY, self._keep_house)

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
            self._worker.sources.add(id_, source)
            self.shell.begin_transfer(id_, body.stream, Role.SOURCE)
        if isinstance(body, CreateVms | DestroyVms):
            self._vm_bodies[id_] = body
        if streams(body):
            body = msgspec.structs.replace(body, first=self._flows.first(ranks.count(who)))
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
            job.streams.append(self._flows.begin_output(job, id_, delivery.targets, body.first))
        if isinstance(body, Run) and body.feed:
            self._flows.begin_input(job, id_, who, partial(self._input_broke, job))
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
            name=self.members.name,
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
                    self._worker.sources.load(record.id, body.stream)
                    self.shell.begin_transfer(record.id, body.stream, Role.SOURCE)
                except OSError as error:
                    log.warning("push %d can't go on: %s", record.id, error)
            now = self.loop.time()
            ttl = None if record.deadline_ms is None else max(0, record.deadline_ms - self.clock_ms(now))
            anew = missing & ranks.union(rank for rank, latest in starts.items() if latest >= record.id)
            self.shell.feed(events.Submit(msgspec.structs.replace(delivery, ttl_ms=ttl), body, missing, anew))
            if streams(body):
                # Its client went with the old service.
                self._flows.begin_output(job, record.id, delivery.targets, body.first).unread()
            if isinstance(body, Run) and body.feed:
                self.cancel(job)  # the rest of its input is gone, and half of one must not pass for the whole
        for roll in self.state.rolls():
            self.roll(roll, reborn.pop(roll.job) if roll.job in reborn else Job())
        self._worker.sources.prune({id_ for id_ in self.jobs if id_ in self._worker.sources})
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

    def _input_broke(self, job: Job, error: OSError) -> None:
        log.error("command %d is cancelled: its input can't be read back from the disk: %s", min(job.ids), error)
        self.cancel(job)

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
                if id_ in self.planning:
                    self.planning.answered(id_, folds)
                    self.forgetting.have(id_, folds)
                    return
                if id_ in self.roll_calls:
                    self._roll_called(id_, folds)
                    return
                self._outcomes(id_, folds)
            case events.TellLate(id_, folds):
                self._answered_late(id_, folds)
            case events.TellSettled(id_):
                self._settled(id_, now)
            case events.TellStream():
                self._flows.streamed(effect, self.jobs.get(effect.id))
            case events.TellTaken():
                self._flows.taken(effect)
            case events.TellProgress(id_, done, left):
                pushed = self._worker.sources.stream(id_)
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
                        self.planning.soon()
                    self.forgetting.soon()
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
        self.forgetting.have(id_, folds)
        self._wake()

    def _wake(self) -> None:
        """Have everybody who waits look again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _answered_late(self, id_: int, folds: Iterable[Fold]) -> None:
        """Hosts answered that are settled: as lost, which then stays and has the answer beside it, or otherwise."""
        late = self.state.late_outcomes(id_, folds)
        self.forgetting.have(id_, late.values())
        if id_ in self.jobs:
            for row, fold in late.items():
                self.jobs[id_].late(fold, partial(self.state.late, row))
        self.forgetting.soon()

    def _outcomes(self, id_: int, folds: tuple[Fold, ...]) -> None:
        made, gone = words(self._vm_bodies.get(id_), folds, self.members.name)
        rows = self.state.command_outcomes(id_, folds, made=made, gone=gone)
        for deployment, vm, _ in gone:
            self.known.vms.pop((deployment, vm), None)
        if gone:
            self.vms_changed()
        self.forgetting.have(id_, folds)
        self._flows.over(id_, folds)
        job = self.jobs.get(id_)
        if job is not None and not self._flows.outcomes(id_, folds, rows):
            for fold, row in zip(folds, rows, strict=True):
                job.fold(fold, partial(self.state.outcome, row))

    def _settled(self, id_: int, now: float) -> None:
        if self.planning.settled(id_):
            return
        if self.roll_calls.settled(id_):
            self.forgetting.soon()
            return
        self.state.command_settles(id_, self.clock_ms(now))
        job = self.jobs.pop(id_, None)
        self._vm_bodies.pop(id_, None)
        self._flows.end_input(id_)
        if id_ in self._worker.sources:
            self.shell.end_transfer(id_)
            self._worker.drop(id_)
        self.forgetting.add(id_)
        self.forgetting.soon()
        if not self._flows.when_told(id_, partial(self._told, id_)) and job is not None:
            job.settled(id_)

    def _told(self, id_: int, job: Job) -> None:
        """The client has all outcomes of a streamed command, each after its output."""
        self.forgetting.soon()
        job.settled(id_)

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
        self.planning.soon()

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

    def close(self) -> None:
        """End: sockets, threads, database."""
        self.forgetting.close()
        self.planning.close()
        if self._house_timer is not None:
            self._house_timer.cancel()
        self.shell.close()
        self._worker.close()
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
