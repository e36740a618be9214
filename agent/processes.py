"""Commands as processes: each in a session and process group of its own, its output bounded, its end seen through a
pidfd.

`os.posix_spawn` and a pidfd on the event loop need no thread and no fork of this process's memory; asyncio's own
subprocesses take half as long again.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from protocol.commands import Run
from protocol.outcomes import Exited, FailedToStart, Killed, Outcome, Output

#: One read from a pipe: Linux's default pipe capacity (pipe(7)).
_READ = 64 << 10
#: After a command has ended, something that it left in the background may hold its pipes open; its outcome waits this
#: long.
_LINGER = 0.2
#: What a command may spool on its host beyond its budget, for each stream.
_SPOOL_MOST = 256 << 20


class _Stream:
    """One pipe from a command: the first `limit` bytes in memory, and all of them in the spool where there are more."""

    def __init__(self, fd: int, limit: int, spool: Path, told: Callable[[int, bytes], None] | None) -> None:
        self._fd = fd
        self._limit = limit
        self._spool = spool
        self._told = told
        self._file: int | None = None
        self.kept = bytearray()
        self.total = 0
        self.spooled = 0
        self.closed = False
        self.discarding = False
        self._done: Callable[[], None] = lambda: None

    def start(self, done: Callable[[], None]) -> None:
        """Read on the event loop; `done()` at the end of the pipe."""
        self._done = done
        os.set_blocking(self._fd, False)
        asyncio.get_running_loop().add_reader(self._fd, self.read)

    def read(self) -> None:
        """Take what there is, one pipe full at most, so that a flood leaves the event loop its turn."""
        try:
            data = os.read(self._fd, _READ)
        except BlockingIOError:
            return
        if not data:
            self.close()
            self._done()
        elif not self.discarding:
            self._keep(data)

    def _keep(self, data: bytes) -> None:
        if self._told is not None:
            self._told(self.total, data)
        self.total += len(data)
        room = self._limit - len(self.kept)
        if self._file is None and len(data) <= room:
            self.kept += data
            return
        if self._file is None:
            self._file = os.open(self._spool, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._write(bytes(self.kept))
            self.kept += data[:room]
        self._write(data)

    def _write(self, data: bytes) -> None:
        if self._file is not None and self.spooled + len(data) <= _SPOOL_MOST:
            with suppress(OSError):  # a full disk costs the spool, never the command; `spooled` tells
                self.spooled += os.write(self._file, data)

    def drain(self) -> None:
        """Take all that is in the pipe now."""
        while not self.closed:
            before = self.total
            self.read()
            if self.total == before:
                return

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
        if self._file is not None:
            os.close(self._file)
            self._file = None


class Process:
    """One command. `finished(outcome, output)` is called once."""

    def __init__(
        self,
        run: Run,
        spool: Path,
        *,
        environment: dict[str, str],
        finished: Callable[[Outcome, Output], None],
        wrote: Callable[[int, int, bytes], None] | None,
    ) -> None:
        """Starts it. `spool` is the path that spool files' names begin with; `wrote(stream, offset, data)` gets its
        output as it comes."""
        self._finished = finished
        self._spool = spool
        self._over = False
        self._status: int | None = None
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        out_r, out_w = os.pipe2(os.O_CLOEXEC)
        err_r, err_w = os.pipe2(os.O_CLOEXEC)
        try:
            self.pid = os.posix_spawnp(
                run.argv[0],
                run.argv,
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, out_w, 1),
                    (os.POSIX_SPAWN_DUP2, err_w, 2),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGHUP),
            )
        except (OSError, ValueError) as error:
            os.close(out_r)
            os.close(err_r)
            self._over = True
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._loop.call_soon(finished, FailedToStart(f"{run.argv[0]}: {why}"), Output())
            return
        finally:
            os.close(out_w)
            os.close(err_w)
        self._pidfd = os.pidfd_open(self.pid)
        self._loop.add_reader(self._pidfd, self._exited)
        self._streams = [
            _Stream(
                fd,
                run.output_limit,
                spool.with_name(f"{spool.name}.{name}"),
                None if wrote is None else partial(wrote, number),
            )
            for number, name, fd in ((1, "out", out_r), (2, "err", err_r))
        ]
        for stream in self._streams:
            stream.start(self._perhaps_done)

    def stop(self, *, hard: bool) -> None:
        """Signal the whole process group: SIGTERM, or SIGKILL with `hard`."""
        if not self._over:
            self._stopped = True
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL if hard else signal.SIGTERM)

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self._stopped:  # before it is reaped: until then nobody else can have its group's number
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        _, self._status = os.waitpid(self.pid, 0)
        for stream in self._streams:
            stream.drain()
        if not self._over:
            self._perhaps_done()
        if not self._over:
            self._loop.call_later(_LINGER, self._finish)

    def _perhaps_done(self) -> None:
        if self._status is not None and all(stream.closed for stream in self._streams):
            self._finish()

    def _finish(self) -> None:
        if self._over or self._status is None:
            return
        self._over = True
        for stream in self._streams:
            stream.discarding = True  # what stays in the background must not die of SIGPIPE
        code = os.waitstatus_to_exitcode(self._status)
        out, err = self._streams
        spool = f"{self._spool}.out, .err" if out.spooled or err.spooled else ""
        output = Output(bytes(out.kept), bytes(err.kept), out.total, err.total, spool)
        self._finished(Exited(code) if code >= 0 else Killed(-code), output)
