"""Bare hosts to running agents, over SSH: the engine of `ctl up`.

The service node opens at most `fanout` ssh processes at a time; each host that is up starts some of those
still waiting, and passes the bundle on (agent/starter.py, which both run). Enrolments come up the sessions
that started the hosts, and welcomes go down them.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from agent import seed_frames, shares, starter
from agent.seed_frames import Archive, Enrol, Job, Result, Terms
from agent.seed_session import Failed
from controller import ssh
from controller.bundle import BundleError, Bundles, Platform

SEED = Path(starter.__file__).with_name("seed.py")
BACKOFF = 1.0  # seconds before the second try, twice that before the third: sshd at its MaxStartups needs a moment
GOODBYE = 5.0  # seconds for the last sessions to end by themselves


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A host to start; `ssh` is what ssh calls it, if not by its name."""

    name: str
    ssh: str = ""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How to bootstrap."""

    fleet: str  # the fleet's id: lower-case letters, digits, dots, dashes, underscores
    fanout: int = 32  # ssh processes on the service node at a time
    tries: int = 3
    flat: bool = False  # start all from the service node
    config: Path | None = None  # ssh -F
    login: str = ""  # ssh -l
    connect_timeout: float = 10.0  # seconds
    window: int = 8  # sessions at a time from each host
    directory: str = ""  # on hosts, in place of /var/lib/canopy and ~/.canopy
    cache: Path | None = None  # of wheels and bundles, in place of the user's
    bundle: str = ""  # the identity of one that hosts have, in place of today's


class Enrolment(msgspec.Struct, frozen=True, kw_only=True):
    """What the service learns about a host: the public half of its agent's keys, and what it is."""

    name: str
    key: str  # the agent's public CURVE key, Z85
    address: str
    control_port: int
    bulk_port: int
    running: bool  # the agent is up already, and stays as it is
    bundle: str  # identity of the bundle that it runs
    python: tuple[int, int]
    machine: str
    libc: str
    libc_version: tuple[int, int]
    uid: int


class Enroller(Protocol):
    """The service, as the bootstrap needs it."""

    async def enrol(self, enrolment: Enrolment) -> bytes:
        """The welcome document for a host; the host fails with the message of what it raises."""


class HostResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one host; `reason` is one sentence, empty where all is well."""

    name: str
    state: Literal["started", "current", "failed"]
    reason: str = ""
    tries: int = 0
    started_by: str = ""  # a host's name, empty for the service node
    went_back: bool = False  # the new agent did not start, and the previous one runs again


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a bootstrap is."""

    total: int
    started: int
    current: int
    failed: int
    latest: HostResult | None = None
    notice: str = ""  # something the user should know, said once

    @property
    def settled(self) -> int:
        """Hosts whose result is final."""
        return self.started + self.current + self.failed


async def bootstrap(
    targets: Sequence[Target],
    options: Options,
    enroller: Enroller,
    progress: Callable[[Progress], None] = lambda _: None,
) -> list[HostResult]:
    """Start an agent on each target; returns one result for each, in their order.

    It is convergent: a host whose agent runs from the right bundle is left alone, and enrolled again.
    Cancelled, it ends all its sessions. Raises SshError where ssh itself cannot be used.
    """
    if not targets:
        return []
    run = _Run(targets, options, enroller, progress)
    return await run.run()


class _Run:
    """One bootstrap; also the upstream of its starter."""

    def __init__(
        self,
        targets: Sequence[Target],
        options: Options,
        enroller: Enroller,
        progress: Callable[[Progress], None],
    ) -> None:
        self._targets = targets
        self._options = options
        self._enroller = enroller
        self._progress = progress
        self._ssh = ssh.Ssh(options.config, options.login)
        self._bundles = Bundles(options.cache)
        self._results: dict[int, HostResult] = {}
        self._tries = [0] * len(targets)
        self._jobs: dict[int, tuple[Job, int]] = {}
        self._counts = {"started": 0, "current": 0, "failed": 0}
        self._retries: set[asyncio.TimerHandle] = set()
        self._all = asyncio.Event()
        self._starter: starter.Starter

    async def run(self) -> list[HostResult]:
        """Run it to its end."""
        options = self._options
        first = await self._resolve_any()
        async with contextlib.AsyncExitStack() as stack:
            socket = ""
            if not options.flat and len(self._targets) > 1:
                socket, problem = await stack.enter_async_context(ssh.forwarded_agent(first))
                if not socket:
                    self._tell(notice=f"{problem}; all hosts are started from here")
            terms = Terms(
                fleet=options.fleet,
                directory=options.directory,
                starter=bool(socket),
                connect_timeout=options.connect_timeout,
                window=min(options.window, options.fanout),
            )
            self._starter = starter.Starter(
                name="",
                terms=terms,
                seed=SEED.read_bytes(),
                slots=max(1, options.fanout - 1),
                parent=False,
                upstream=self,
                command=lambda job, remote: self._ssh.command(self._destination(job.id), remote, terms, socket),
            )
            work = asyncio.gather(self._resolve_all(), self._all.wait())
            broken = asyncio.create_task(self._starter.broken())
            try:
                await asyncio.wait((work, broken), return_when=asyncio.FIRST_COMPLETED)
                for end in (broken, work):
                    if end.done():
                        end.result()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._starter.over(), GOODBYE)
            finally:
                work.cancel()
                broken.cancel()
                for timer in self._retries:
                    timer.cancel()
                await self._starter.close()
        return [self._results[index] for index in range(len(self._targets))]

    def _destination(self, index: int) -> str:
        target = self._targets[index]
        return target.ssh or target.name

    async def _resolve_any(self) -> ssh.Resolved:
        """The settings of the first target with a proper name: they decide which SSH agent is forwarded."""
        problem = ssh.SshError("no targets")
        for index in range(len(self._targets)):
            if ssh.NAME.fullmatch(self._destination(index)):
                return await self._ssh.resolve(self._destination(index))
            problem = ssh.SshError("not a host name")
        raise problem

    async def _resolve_all(self) -> None:
        """Feed the targets in as ssh says how it reaches them; that takes one process of the fanout."""
        alone = self._options.fanout == 1
        for index, target in enumerate(self._targets):
            try:
                resolved = await self._ssh.resolve(self._destination(index))
            except ssh.SshError as error:
                self._finish(index, HostResult(name=target.name, state="failed", reason=str(error)))
                continue
            route = ssh.route(resolved, self._ssh.known(resolved))
            job = Job(id=index, name=target.name, route=route)
            self._jobs[index] = job, resolved.processes
            if not alone:
                self._starter.add([job], own=route is None, weight=resolved.processes)
        self._starter.feed(shares.Resized(slots=self._options.fanout))
        for job, weight in self._jobs.values() if alone else ():
            self._starter.add([job], own=job.route is None, weight=weight)

    async def enrol(self, enrolment: Enrol) -> bytes:
        """Ask the service for a host's welcome."""
        facts = msgspec.structs.asdict(enrolment)
        name = self._targets[facts.pop("id")].name
        try:
            ipaddress.ip_address(enrolment.address.partition("%")[0])
        except ValueError:
            raise Failed("the host reports an address that is none") from None
        try:
            return await self._enroller.enrol(Enrolment(name=name, bundle=facts.pop("identity"), **facts))
        except Exception as error:  # whatever the service says against a host ends that host alone
            raise Failed(str(error) or type(error).__name__) from error

    async def bundle(self, platform: seed_frames.Platform) -> Archive:
        """Make the bundle for a platform, or find it in the cache."""
        if self._options.bundle:
            return Archive(identity=self._options.bundle, sha256="", content=b"")
        wanted = Platform(**msgspec.structs.asdict(platform))
        try:
            made = await asyncio.to_thread(self._bundles.get, wanted)
        except BundleError as error:
            raise Failed(str(error)) from error
        return Archive(identity=made.identity, sha256=made.sha256, content=made.archive)

    def ask(self) -> None:
        """There is nobody above the service node."""

    def settled(self, result: Result) -> None:
        """Take a result as final, or try again from here: a failure that another host found may be that one's own."""
        if result.id in self._results:
            return
        self._tries[result.id] += 1
        tries = self._tries[result.id]
        found_here = not result.by
        hopeless = result.reached or (found_here and (result.lasting or tries >= self._options.tries))
        if result.state != "failed" or hopeless:
            name = self._targets[result.id].name
            self._finish(
                result.id,
                HostResult(
                    name=name,
                    state=result.state,
                    reason=result.reason,
                    tries=tries,
                    started_by=result.by,
                    went_back=result.went_back,
                ),
            )
        else:
            delay = BACKOFF * tries if found_here else 0.0
            self._retries.add(asyncio.get_running_loop().call_later(delay, self._again, result.id))

    def _again(self, index: int) -> None:
        job, weight = self._jobs[index]
        self._starter.add([job], own=True, weight=weight)

    def _finish(self, index: int, result: HostResult) -> None:
        self._results[index] = result
        self._counts[result.state] += 1
        self._tell(latest=result)
        if len(self._results) == len(self._targets):
            self._all.set()

    def _tell(self, latest: HostResult | None = None, notice: str = "") -> None:
        self._progress(Progress(total=len(self._targets), latest=latest, notice=notice, **self._counts))
