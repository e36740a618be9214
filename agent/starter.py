"""A starter: sessions over SSH to bare hosts, each run by a seed, and the sharing of the work with those that are up.

The service node and every host that starts others run this same class. They differ in what is above them
(the service, or the frames to the parent: the `Upstream`) and in the ssh command for a host. Only what is
in Shares is decided there; here it is carried out.

While hosts start hosts, each of them can use the forwarded SSH agent, and vouches for the public keys of
those that it starts. Where that is too much trust, all are started from the service node (`--flat`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

import msgspec

from agent import shares
from agent.seed_frames import (
    SHARE,
    Archive,
    Begin,
    Done,
    Down,
    Enrol,
    Hello,
    Install,
    Job,
    Jobs,
    Need,
    Ping,
    Platform,
    Refused,
    Result,
    Supply,
    Terms,
    Want,
    Welcome,
    frame,
)
from agent.seed_session import Command, Failed, Session, printable, remote_command

LOGIN_GRACE = 30.0  # seconds from a connection to the seed's first word: slow login scripts, a loaded host
INSTALL_DEADLINE = 180.0  # 4 MB at 0.3 Mbit/s, unpacking, and the agent making its keys
ENROL_DEADLINE = 120.0  # for the service's welcome, with all hosts asking at once
START_DEADLINE = 240.0  # stopping an agent, starting another, and going back have their own deadlines below this
SILENCE = 30.0  # without a frame for so long, a host that starts others is given up


class Upstream(Protocol):
    """What is above a starter."""

    async def enrol(self, enrolment: Enrol) -> bytes:
        """The welcome for a host; raises Failed."""

    async def bundle(self, platform: Platform) -> Archive:
        """The bundle for a platform; raises Failed."""

    def settled(self, result: Result) -> None:
        """What became of a host is known."""

    def ask(self) -> None:
        """More hosts are wanted."""


class Starter:
    """Brings hosts up, and shares those that wait with the ones that are."""

    def __init__(
        self,
        *,
        name: str,
        terms: Terms,
        seed: bytes,
        slots: int,
        parent: bool,
        upstream: Upstream,
        command: Callable[[Job, str], Command],
    ) -> None:
        """`command` makes the ssh command for a job and the remote command."""
        self._name = name
        self._terms = terms
        self._seed = seed
        self._remote = remote_command(seed)
        self._upstream = upstream
        self._command = command
        self._shares = shares.Shares(slots, parent=parent)
        self._jobs: dict[int, Job] = {}
        self._sessions: dict[int, Session] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ending: set[int] = set()
        self._over = asyncio.Event()
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closed = False

    def add(self, jobs: Sequence[Job], *, own: bool = False, weight: int = 1) -> None:
        """Take on hosts; `own` ones are started from here and nowhere else."""
        self._jobs.update((job.id, job) for job in jobs)
        self.feed(shares.Added(hosts=tuple(job.id for job in jobs), own=own, weight=weight))

    def feed(self, event: shares.Event) -> None:
        """Tell Shares what happened, and do what it says."""
        if self._closed:
            return
        for effect in self._shares.handle(event):
            self._perform(effect)
        if self._shares.over:
            self._over.set()
        else:
            self._over.clear()

    def _perform(self, effect: shares.Effect) -> None:
        match effect:
            case shares.Start():
                self._spawn(self._run(self._jobs[effect.host]))
            case shares.Grant():
                for first in range(0, len(effect.hosts), SHARE):
                    jobs = tuple(self._jobs[host] for host in effect.hosts[first : first + SHARE])
                    self._post(effect.worker, Jobs(jobs=jobs))
            case shares.Dismiss():
                self._post(effect.worker, Done())
            case shares.Ask():
                self._upstream.ask()
            case shares.GiveBack():
                reason = "the hosts that were to start it were lost"
                self._upstream.settled(Result(id=effect.host, state="failed", reason=reason, reached=False))

    def _post(self, worker: int, message: Down, blob: bytes = b"") -> None:
        if session := self._sessions.get(worker):
            session.post(frame(message, blob))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._ending.discard(id(task))
        if not task.cancelled() and (error := task.exception()) and not self._broken.done():
            self._broken.set_exception(error)

    async def broken(self) -> None:
        """Wait for a fault in here, and raise it: unseen, it would leave a host waiting for ever."""
        await self._broken

    async def over(self) -> None:
        """Wait until nothing is left to do."""
        await self._over.wait()

    async def close(self) -> None:
        """End all sessions at once."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            if id(task) not in self._ending:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, job: Job) -> None:
        session = None
        try:
            session = await Session.open(self._command(job, self._remote))
            self._sessions[job.id] = session
            result = await self._bring_up(job, session)
            self._settle(result)
            if result.state != "failed":
                await self._attend(job, session)
        except OSError as error:
            reason = f"ssh cannot be run here: {error.strerror}"
            self._settle(Result(id=job.id, state="failed", reason=reason, reached=False))
        finally:
            # From here on the task is left to finish: cut short, it would leave a process behind.
            self._ending.add(id(asyncio.current_task()))
            self._sessions.pop(job.id, None)
            if session:
                await session.close()
            self.feed(shares.Ended(host=job.id))

    def _settle(self, result: Result) -> None:
        if not result.by:
            result = msgspec.structs.replace(result, by=self._name)
        self.feed(shares.Settled(host=result.id, reached=result.reached))
        self._upstream.settled(result)

    async def _bring_up(self, job: Job, session: Session) -> Result:
        """From nothing to a result."""
        limit = self._terms.connect_timeout
        stage = f"nothing ran on the host within {LOGIN_GRACE:.0f} s of its SSH connection"
        reached = False
        try:
            begin = Begin(id=job.id, name=job.name, terms=self._terms)
            await session.write(self._seed + frame(begin))
            await asyncio.wait_for(session.greet(), limit + LOGIN_GRACE)
            reached = True
            hello = await asyncio.wait_for(session.receive(), LOGIN_GRACE)
            if isinstance(hello, Result):
                return self._own(job, hello)
            if not isinstance(hello, Hello):
                raise Failed("the host's seed spoke out of turn")
            archive = await self._upstream.bundle(hello.platform)
            stage = f"the bundle was not installed within {INSTALL_DEADLINE:.0f} s"
            content = b"" if archive.identity in hello.stored else archive.content
            install = Install(identity=archive.identity, sha256=archive.sha256, blob=len(content))
            await asyncio.wait_for(session.write(frame(install, content)), INSTALL_DEADLINE)
            enrolment = await asyncio.wait_for(session.receive(), INSTALL_DEADLINE)
            # A host whose new agent does not start enrols the previous one again.
            for _ in range(2):
                if not isinstance(enrolment, Enrol) or enrolment.id != job.id:
                    break
                stage = f"the service did not welcome the host within {ENROL_DEADLINE:.0f} s"
                welcome = await asyncio.wait_for(self._upstream.enrol(enrolment), ENROL_DEADLINE)
                stage = f"the agent did not start within {START_DEADLINE:.0f} s"
                await session.write(frame(Welcome(id=job.id, blob=len(welcome)), welcome))
                enrolment = await asyncio.wait_for(session.receive(), START_DEADLINE)
            if not isinstance(enrolment, Result):
                raise Failed("the host's seed spoke out of turn")
            return self._own(job, enrolment)
        except asyncio.TimeoutError:
            reason, lasting, reached = stage, False, False
        except Failed as failure:
            reason, lasting, reached = printable(str(failure), 1000), True, True
        except (EOFError, ConnectionError):
            reason, lasting = await session.ended(limit)
            if reached:
                reason, lasting, reached = f"the session was cut short: {reason}", False, False
        return Result(id=job.id, state="failed", reason=reason, reached=reached, lasting=lasting)

    def _own(self, job: Job, result: Result) -> Result:
        reason = printable(result.reason, 400)
        return Result(id=job.id, state=result.state, reason=reason, went_back=result.went_back)

    async def _attend(self, job: Job, session: Session) -> None:
        """Serve a host that starts others, until it has no more to do, is lost, or breaks the rules."""
        with contextlib.suppress(asyncio.TimeoutError, EOFError, Failed, ConnectionError):
            while True:
                message = await asyncio.wait_for(session.receive(), SILENCE)
                match message:
                    case Want():
                        self.feed(shares.Asked(worker=job.id))
                    case Ping():
                        pass
                    case Need():
                        self._spawn(self._supply(session, message.platform))
                    case Enrol() if self._shares.belongs(message.id, job.id):
                        self._spawn(self._welcome(session, message))
                    case Result() if self._shares.belongs(message.id, job.id):
                        said = {"reason": printable(message.reason), "by": printable(message.by) or job.name}
                        self._settle(msgspec.structs.replace(message, **said))
                    case _:
                        # A host that was taken back from this one may still be spoken for: that is no offence.
                        continue

    async def _supply(self, session: Session, platform: Platform) -> None:
        try:
            archive = await self._upstream.bundle(platform)
        except Failed as failure:
            session.post(frame(Supply(platform=platform, reason=str(failure))))
            return
        size = len(archive.content)
        supply = Supply(platform=platform, identity=archive.identity, sha256=archive.sha256, blob=size)
        session.post(frame(supply, archive.content))

    async def _welcome(self, session: Session, enrolment: Enrol) -> None:
        try:
            welcome = await self._upstream.enrol(enrolment)
        except Failed as failure:
            session.post(frame(Refused(id=enrolment.id, reason=str(failure))))
            return
        session.post(frame(Welcome(id=enrolment.id, blob=len(welcome)), welcome))
