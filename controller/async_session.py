"""The Python API for asyncio: what `controller.Session` does, without a thread.

>>> import asyncio
>>> from controller import AsyncSession
>>> async def main():
...     session = AsyncSession()
...     async for result in await session.run("echo up"):
...         assert (result.ok, result.stdout) == (True, b"up\\n"), result.hosts
...     jobs = await asyncio.gather(*(session.run(f"echo {number}", "h0") for number in range(3)))
...     return [result.stdout for job in jobs for result in await job.results()]
>>> asyncio.run(main())
[b'0\\n', b'1\\n', b'2\\n']
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, Literal, TypeAlias, TypeVar, Unpack, cast, overload

from controller import api
from controller.asking import RunOptions, run_request
from controller.asking_files import PathLike, PullOptions, PushOptions, pull_request, push_request
from controller.client import fleet_directory
from controller.results import Fetched, Followed, Happening, Piece, Progress, Result
from controller.session import Session
from controller.status import CtlError, ExitStatus

#: What iterating over a job gives.
H_co = TypeVar("H_co", covariant=True)
_Reply = TypeVar("_Reply")
_GONE = "the service went away: see its log, then `ctl up` again"


class _Connection:
    """One request's connection to the service."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def send(self, request: api.Request) -> None:
        """Send a request. Raises CtlError where nobody is there any more."""
        try:
            self._writer.write(api.pack(request))
            await self._writer.drain()
        except OSError as error:
            raise CtlError(_GONE, ExitStatus.NO_SERVICE) from error

    async def receive(self) -> api.Reply:
        """The next reply. Raises CtlError where the service said Failed, or is gone."""
        try:
            length = api.length_of(await self._reader.readexactly(api.LENGTH_BYTES))
            reply = api.unpack_reply(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            await self.close()
            raise CtlError(_GONE, ExitStatus.NO_SERVICE) from error
        if isinstance(reply, api.Failed):
            await self.close()
            raise CtlError(reply.why, ExitStatus(reply.status))
        return reply

    async def close(self) -> None:
        """End the connection; a command that still runs on it is cancelled."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()


class AsyncRunning(Followed, Generic[H_co]):
    """A running command: iterate over it with `async for`.

    Leaving it (`close`, or the end of an `async with`) cancels what still runs, unless it was begun detached or is only
    followed. It belongs to one task at a time.
    """

    def __init__(self, accepted: api.Accepted, connection: _Connection) -> None:
        super().__init__(accepted.id, accepted.hosts, accepted.what)
        self._connection = connection

    async def __aenter__(self) -> AsyncRunning[H_co]:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[H_co]:
        """What happens, as it happens, until every target has its outcome; of a job that was asked for without waiting
        what is on record."""
        while not self.over:
            # The service sends what was asked for, and nothing else: the type says what that is.
            for happening in self.take(await self._connection.receive()):
                yield cast(H_co, happening)
        await self.close()

    async def results(self) -> list[Result]:
        """All results, equal ones in one, in the order of their first hosts."""
        return self.merged([cast(Happening, happening) async for happening in self])

    async def cancel(self) -> None:
        """Ask all hosts to stop; go on iterating for their outcomes."""
        if not self.over:
            await self._connection.send(api.Cancel())

    async def close(self) -> None:
        """Leave it."""
        await self._connection.close()


#: A running command of any kind.
AsyncJob: TypeAlias = AsyncRunning[Happening]


class AsyncSession:
    """The service of one fleet. Raises CtlError (with `.status`) for whatever goes wrong.

    Any number of tasks may use it at once: each job and each question has a connection of its own.
    """

    def __init__(self, fleet: str | None = None) -> None:
        """`fleet` is a fleet's name; None takes `$CANOPY_FLEET`, else `default`."""
        self.directory = fleet_directory(fleet)
        self._fleet = fleet

    @overload
    async def run(
        self,
        command: str | Sequence[str],
        hosts: str | Iterable[str] | None = None,
        *,
        stream: Literal[False] = False,
        stdin: bytes | None = None,
        **options: Unpack[RunOptions],
    ) -> AsyncRunning[Result]: ...

    @overload
    async def run(
        self,
        command: str | Sequence[str],
        hosts: str | Iterable[str] | None = None,
        *,
        stream: bool,
        stdin: bytes | None = None,
        **options: Unpack[RunOptions],
    ) -> AsyncRunning[Result | Piece]: ...

    async def run(
        self,
        command: str | Sequence[str],
        hosts: str | Iterable[str] | None = None,
        *,
        stream: bool = False,
        stdin: bytes | None = None,
        **options: Unpack[RunOptions],
    ) -> AsyncRunning[Any]:
        """Run a shell string, or an argument vector, as `Session.run` does. `stdin` is bytes alone."""
        chosen = await self._names(hosts)
        return await self._job(run_request(command, chosen, stream=stream, stdin=stdin, **options))

    async def push(
        self,
        source: PathLike | Sequence[PathLike],
        destination: str,
        hosts: str | Iterable[str] | None = None,
        **options: Unpack[PushOptions],
    ) -> AsyncRunning[Result | Progress]:
        """Push files and directories, as `Session.push` does."""
        chosen = await self._names(hosts)
        return await self._job(await asyncio.to_thread(push_request, source, destination, chosen, **options))

    async def pull(
        self,
        paths: str | Sequence[str],
        directory: PathLike,
        hosts: str | Iterable[str] | None = None,
        **options: Unpack[PullOptions],
    ) -> AsyncRunning[Result | Fetched]:
        """Bring files and directories of hosts here, as `Session.pull` does."""
        return await self._job(pull_request(paths, directory, await self._names(hosts), **options))

    async def job(self, id_: int, *, wait: bool = True) -> AsyncJob:
        """A job by its number, from its beginning: what came of it so far, and with `wait` what still comes."""
        return await self._job(api.FollowJob(id=id_, wait=wait))

    async def jobs(self, most: int = 20) -> tuple[api.JobStatus, ...]:
        """The latest jobs, newest first."""
        return (await self._ask(api.GetJobs(most=most), api.Jobs)).jobs

    async def cancel_job(self, id_: int) -> None:
        """Stop a job on all hosts."""
        await self._ask(api.CancelJob(id=id_), api.Done)

    async def status(self) -> api.Status:
        """The fleet: hosts, VMs, and what is known of each."""
        return await self._ask(api.GetStatus(), api.Status)

    async def select(
        self,
        where: str | Iterable[str] = (),
        *,
        exclude: str | Iterable[str] = (),
        labels: Mapping[str, str] | None = None,
        pick: int | None = None,
    ) -> tuple[str, ...]:
        """The hosts that host sets stand for, as `Session.select` has it."""
        # Groups are read from files and, for some, from programs: a thread's work.
        session = Session(self._fleet)
        return await asyncio.to_thread(session.select, where, exclude=exclude, labels=labels, pick=pick)

    async def _names(self, hosts: str | Iterable[str] | None) -> tuple[str, ...] | None:
        return await self.select(hosts) if isinstance(hosts, str) else None if hosts is None else tuple(hosts)

    async def _connect(self) -> _Connection:
        try:
            return _Connection(*await asyncio.open_unix_connection(self.directory / "client.sock"))
        except OSError as error:
            raise CtlError(
                f"no service runs for this fleet ({self.directory.name}): start one with `ctl up`",
                ExitStatus.NO_SERVICE,
            ) from error

    async def _ask(self, request: api.Request, wanted: type[_Reply]) -> _Reply:
        connection = await self._connect()
        try:
            await connection.send(request)
            reply = await connection.receive()
        finally:
            await connection.close()
        if not isinstance(reply, wanted):
            raise CtlError(f"the service answered with a {type(reply).__name__}, not a {wanted.__name__}")
        return reply

    async def _job(self, request: api.Request) -> AsyncRunning[Any]:
        connection = await self._connect()
        try:
            await connection.send(request)
            reply = await connection.receive()
            if not isinstance(reply, api.Accepted):
                raise CtlError(f"the service answered with a {type(reply).__name__}, not with a command's number")
        except BaseException:
            await connection.close()
            raise
        return AsyncRunning(reply, connection)
