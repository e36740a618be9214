"""Commands as processes: each in a session and process group of its own, its output bounded, its end seen through a
pidfd.

`os.posix_spawn` and a pidfd on the event loop need no thread and no fork of this process's memory; asyncio's own
subprocesses take half as long again.
"""

from __future__ import annotations

import asyncio
import fcntl
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

#: Python ignores SIGPIPE and SIGXFSZ, and whoever started the agent perhaps others: none of it is to be inherited.
_ALL_SIGNALS = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}


class _Stream:
    """One pipe from a command: the first `limit` bytes in memory, and all of them in the spool where there are more."""

    def __init__(self, fd: int, limit: int, spool: Path, told: Callable[[int, bytes], None] | None) -> None:
        self._fd = fd
        self._limit = limit
        self.spool = spool
        self._told = told
        self._file: int | None = None
        self.kept = bytearray()
        self.total = 0
        self.spooled = 0
        self._full = False
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
        if self._file is None and not self._full:
            with suppress(OSError):
                self._file = os.open(self.spool, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._write(bytes(self.kept))
        self.kept += data[: max(0, room)]
        self._write(data)

    def _write(self, data: bytes) -> None:
        """To the spool, until there is no more room: that costs the spool, never the command; `spooled` tells."""
        if self._full:
            return
        written = 0
        if self._file is not None and self.spooled + len(data) <= _SPOOL_MOST:
            with suppress(OSError):
                written = os.write(self._file, data)
        self.spooled += written
        self._full = written < len(data)  # a gap in the middle would be worse than an end too early

    def drain(self) -> None:
        """Take what is in the pipe now, and not what is written meanwhile: that could be without end."""
        most = self.total + (0 if self.closed else fcntl.fcntl(self._fd, fcntl.F_GETPIPE_SZ))
        while not self.closed and self.total < most:
            before = self.total
            self.read()
            if self.total == before:
                return

    def discard(self) -> None:
        """Read on, since what stays in the background must not die of SIGPIPE, and keep nothing more."""
        self.discarding = True
        self._close_spool()

    def is_whole(self) -> bool:
        """Whether the spool holds all that was written. One that does not is removed: nobody is told of it."""
        if self.spooled == self.total:
            return self.total > 0
        if self.spooled:
            self.spool.unlink(missing_ok=True)
        return False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
        self._close_spool()

    def _close_spool(self) -> None:
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
        self._over = False
        self._ended = False
        self._stopped = self._killed = False
        self._loop = asyncio.get_running_loop()
        self._pipes: list[int] = []
        try:
            self._start(run, environment)
        except (OSError, ValueError) as error:
            for fd in self._pipes:
                os.close(fd)
            self._over = True
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            self._loop.call_soon(finished, FailedToStart(f"{run.argv[0]}: {why}"), Output())
            return
        self._loop.add_reader(self._pidfd, self._exited)
        self._streams = [
            _Stream(
                fd,
                run.output_limit,
                spool.with_name(f"{spool.name}.{name}"),
                None if wrote is None else partial(wrote, number),
            )
            for number, name, fd in zip((1, 2), ("out", "err"), self._pipes, strict=True)
        ]
        for stream in self._streams:
            stream.start(self._perhaps_done)

    def _start(self, run: Run, environment: dict[str, str]) -> None:
        """Fork and execute. Raises OSError, ValueError."""
        writing: list[int] = []
        try:
            for _ in range(2):
                read, write = os.pipe2(os.O_CLOEXEC)
                self._pipes.append(read)
                writing.append(write)
            out, err = writing
            self.pid = os.posix_spawnp(
                run.argv[0],
                run.argv,
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, out, 1),
                    (os.POSIX_SPAWN_DUP2, err, 2),
                ],
                setsid=True,
                setsigmask=(),
                setsigdef=_ALL_SIGNALS,
            )
        finally:
            for fd in writing:
                os.close(fd)
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError:  # out of descriptors: whoever can't be watched may not run
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise

    def stop(self, *, hard: bool) -> None:
        """Signal the whole process group: SIGTERM, or SIGKILL with `hard`."""
        if not self._over:
            self._stopped = True
            self._killed |= hard
            self._signal(signal.SIGKILL if hard else signal.SIGTERM)
            if hard and self._ended:
                self._loop.call_later(_LINGER, self._finish)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._ended = True
        for stream in self._streams:
            stream.drain()
        if not self._over:
            self._perhaps_done()
        # Where it was stopped, what it left has the same time to end as it had itself, until the certain signal.
        if not self._over and (self._killed or not self._stopped):
            self._loop.call_later(_LINGER, self._finish)

    def _perhaps_done(self) -> None:
        if self._ended and all(stream.closed for stream in self._streams):
            self._finish()

    def _finish(self) -> None:
        if self._over or not self._ended:
            return
        self._over = True
        if self._stopped:
            self._signal(signal.SIGKILL)
        # Reaped at last: until here nobody else could have the number of its group, and a `stop` hit nobody else.
        _, status = os.waitpid(self.pid, 0)
        for stream in self._streams:
            stream.discard()
        code = os.waitstatus_to_exitcode(status)
        out, err = self._streams
        spool = ", ".join(str(stream.spool) for stream in self._streams if stream.is_whole())
        output = Output(bytes(out.kept), bytes(err.kept), out.total, err.total, spool)
        self._finished(Exited(code) if code >= 0 else Killed(-code), output)
