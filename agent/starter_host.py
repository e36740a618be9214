"""A starter on a host: it takes its share from the seed's parent, and passes on what its own hosts say."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from agent import shares
from agent.seed_frames import (
    Archive,
    Begin,
    Done,
    Enrol,
    Job,
    Jobs,
    Need,
    Ping,
    Platform,
    Refused,
    Result,
    Supply,
    Terms,
    Up,
    Want,
    Welcome,
    down,
    frame,
)
from agent.seed_session import NOISE, Command, Failed, ssh_options
from agent.starter import Starter

PING = 5.0  # seconds between signs of life; the parent gives up at starter.SILENCE


class Parent:
    """The upstream of a starter on a host: frames over the seed's standard input and output."""

    def __init__(self, mine: Archive, platform: Platform) -> None:
        """`mine` is this host's own bundle, and serves all hosts of its platform."""
        self._bundles: dict[Platform, asyncio.Future[Archive]] = {}
        self._welcomes: dict[int, asyncio.Future[bytes]] = {}
        self._input = asyncio.StreamReader(limit=NOISE)
        if hashlib.sha256(mine.content).hexdigest() == mine.sha256:
            self._bundles[platform] = asyncio.get_running_loop().create_future()
            self._bundles[platform].set_result(mine)
        # sshd gives one socket for both directions, which asyncio's pipe transports cannot share.
        asyncio.get_running_loop().add_reader(0, self._read)

    def _read(self) -> None:
        part = os.read(0, 1 << 16)
        if part:
            self._input.feed_data(part)
        else:
            asyncio.get_running_loop().remove_reader(0)
            self._input.feed_eof()

    def send(self, message: Up) -> None:
        """Send a frame up. It blocks where the parent does not read, which it always does."""
        rest = memoryview(frame(message))
        while rest:
            rest = rest[os.write(1, rest) :]

    async def enrol(self, enrolment: Enrol) -> bytes:
        """Have the service's welcome relayed."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._welcomes[enrolment.id] = future
        self.send(enrolment)
        return await future

    async def bundle(self, platform: Platform) -> Archive:
        """The bundle for a platform, asked for once."""
        if platform not in self._bundles:
            self._bundles[platform] = asyncio.get_running_loop().create_future()
            self.send(Need(platform=platform))
        return await asyncio.shield(self._bundles[platform])

    def settled(self, result: Result) -> None:
        """Pass a result up."""
        self.send(result)

    def ask(self) -> None:
        """Pass a request for more up."""
        self.send(Want())

    async def serve(self, starter: Starter) -> None:
        """Take in the parent's frames until it is gone."""
        while True:
            size = int.from_bytes(await self._input.readexactly(4), "big")
            message = down(await self._input.readexactly(size))
            match message:
                case Jobs():
                    starter.add(message.jobs)
                case Done():
                    starter.feed(shares.NoMore())
                case Welcome():
                    blob = await self._input.readexactly(message.blob)
                    if future := self._welcomes.pop(message.id, None):
                        future.set_result(blob)
                case Refused():
                    if future := self._welcomes.pop(message.id, None):
                        future.set_exception(Failed(message.reason))
                case Supply():
                    blob = await self._input.readexactly(message.blob)
                    waiting = self._bundles[message.platform]
                    if message.reason:
                        waiting.set_exception(Failed(message.reason))
                    else:
                        waiting.set_result(Archive(identity=message.identity, sha256=message.sha256, content=blob))
                case _:
                    return


def ssh_from_host(job: Job, remote: str, terms: Terms, scratch: Path) -> Command:
    """The ssh command on a host for another: no configuration but what the service node resolved for that one."""
    route = job.route
    if route is None:
        raise Failed("only the service node can start this host")
    keys = scratch / f"known_hosts-{job.id}"
    keys.write_text("".join(line + "\n" for line in route.known_hosts))
    options = {
        "UserKnownHostsFile": str(keys),
        "GlobalKnownHostsFile": "/dev/null",
        "StrictHostKeyChecking": route.strict,
        "UpdateHostKeys": "no",
        "IdentityFile": "none",
    }
    if route.alias:
        options["HostKeyAlias"] = route.alias
    argv = ["ssh", "-F", "/dev/null", "-A", *ssh_options(terms, options)]
    argv += ["-p", str(route.port), "-l", route.user, "--", route.hostname, remote]
    return Command(argv=tuple(argv), env=os.environ)


def serve(directory: Path, begin: Mapping[str, Any], mine: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Start hosts from this one until the parent has no more; the seed calls it with the frames that it had."""
    with contextlib.suppress(EOFError, BrokenPipeError):
        asyncio.run(_serve(directory, begin, mine, more))


async def _serve(directory: Path, begin: Mapping[str, Any], mine: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    this = msgspec.convert(begin, Begin)
    content = b""
    with contextlib.suppress(OSError):
        content = (directory / "bundle" / f"{mine['identity']}.tar.gz").read_bytes()
    archive = Archive(identity=mine["identity"], sha256=mine["sha256"], content=content)
    platform = {name: mine[name] for name in ("python", "machine", "libc", "libc_version")}
    parent = Parent(archive, msgspec.convert(platform, Platform))
    scratch = Path(tempfile.mkdtemp(prefix="starter-", dir=directory))
    seed = Path(__file__).with_name("seed.py").read_bytes()
    starter = Starter(
        name=this.name,
        terms=this.terms,
        seed=seed,
        slots=this.terms.window,
        parent=True,
        upstream=parent,
        command=lambda job, remote: ssh_from_host(job, remote, this.terms, scratch),
    )
    serving = asyncio.create_task(parent.serve(starter))
    pinging = asyncio.create_task(_ping(parent))
    ends = [serving, pinging, *map(asyncio.ensure_future, (starter.over(), starter.broken()))]
    try:
        starter.add(msgspec.convert(more, Jobs).jobs)
        done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in done:
            end.result()
    finally:
        for end in ends:
            end.cancel()
        await starter.close()
        shutil.rmtree(scratch, ignore_errors=True)


async def _ping(parent: Parent) -> None:
    while True:
        await asyncio.sleep(PING)
        parent.send(Ping())
