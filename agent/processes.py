"""Commands as processes: each in a session and process group of its own, its output bounded, its end seen through a
pidfd.

A pidfd on the event loop needs no thread; asyncio's own subprocesses take half as long again. How a process begins is
in `executing`, what became of those that left its group in `orphans`.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path

from agent import orphans
from agent.executing import Unable, execute, given_input
from agent.inlet import Inlet
from agent.outlet import Outlet
from agent.spool import Spools, spool_name
from agent.watching import Watching
from protocol.commands import Run
from protocol.outcomes import NO_OUTPUT, Exited, FailedToStart, Killed, Outcome, Output, Refused

#: One read from a pipe: Linux's default pipe capacity (pipe(7)).
_READ = 64 << 10
#: And that of the pipe of a command that has filled it once, which is read that much at a time: each time that the
#: agent wakes up costs more than the 64 KiB that it would get.
_WIDE = 256 << 10
#: A command that has written more than a pipe holds is given so long (s) to fill it again where little was in it: a
#: flood took eleven times as many reads without. _WIDE a millisecond are 262 MB/s: who writes a KiB at a time comes at
#: 200 MB/s streamed and 370 into the spool, and would without at 264 and 625, for twice the CPU time.
_REST = 0.001
#: After a command has ended, something that it left in the background may hold its pipes open; its outcome waits this
#: long.
_LINGER = 0.2
#: What a command may spool on its host beyond its budget, for each stream.
_SPOOL_MOST = 256 << 20


class _Stream:
    """One pipe from a command: the first `limit` bytes in memory, and all of them in the spool where there are more.

    What is streamed is in no spool: it is not read from the pipe before there is room for it on its way.
    """

    def __init__(
        self, number: int, fd: int, limit: int, *, spools: Spools, id_: int, outlet: Outlet | None, watching: Watching
    ) -> None:
        self._number = number
        self._fd = fd
        self._limit = limit
        self._spools = spools
        self._id = id_
        self._watching = watching
        self._outlet = outlet
        self._paused = self._watched = False
        self._most = _READ
        self._file: int | None = None
        self.kept = bytearray()
        self.total = 0
        self.spooled = 0
        self._full = False
        self.closed = False
        self.discarding = False
        self._done: Callable[[], None] = lambda: None

    @property
    def spool(self) -> Path:
        """Where all of it is kept that is more than the budget: few commands need to know."""
        return self._spools.folder / spool_name(self._id, self._number)

    def start(self, done: Callable[[], None]) -> None:
        """Read on the event loop; `done()` at the end of the pipe."""
        self._done = done
        os.set_blocking(self._fd, False)
        self._watch()

    def _watch(self) -> None:
        if not self._watched and not self._paused and not self.closed:
            self._watched = True
            self._watching.add(self._fd, self.read)

    def _unwatch(self) -> None:
        if self._watched:
            self._watched = False
            self._watching.remove(self._fd)

    def _rest(self) -> None:
        """Let the pipe fill up: who is woken by each page that a command writes spends all its time on that."""
        self._unwatch()
        asyncio.get_running_loop().call_later(_REST, self._watch)

    def read(self) -> None:
        """Take what there is, one pipe full at most, so that a flood leaves the event loop its turn."""
        try:
            data = os.read(self._fd, self._most if self._outlet is None else min(self._most, self._outlet.ahead))
        except BlockingIOError:
            return
        if not data:
            self.close()
            self._done()
            return
        if not self.discarding:
            self._keep(data)
        if self.total > _READ and self._watched:
            if self._most < _WIDE:
                self._widen()
            if len(data) < _READ // 4:
                self._rest()

    def _widen(self) -> None:
        """Have the pipe hold more, where this user may have so much in pipes."""
        self._most = _WIDE
        with suppress(OSError):
            fcntl.fcntl(self._fd, fcntl.F_SETPIPE_SZ, _WIDE)

    def _keep(self, data: bytes) -> None:
        self.total += len(data)
        room = self._limit - len(self.kept)
        if self._outlet is not None:
            self.kept += data[: max(0, room)]
            self._outlet.write(self._number, data)
            if self._outlet.full and not self.closed and not self._paused:
                self._paused = True
                self._unwatch()
            return
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
        if (
            self._file is not None
            and self.spooled + len(data) <= _SPOOL_MOST
            and self._spools.room(self.spool, len(data))
        ):
            with suppress(OSError):
                written = os.write(self._file, data)
        self.spooled += written
        self._full = written < len(data)  # a gap in the middle would be worse than an end too early

    def resume(self) -> None:
        """There is room again."""
        if self._paused and not self.closed:
            self._paused = False
            self._watch()

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
        self.resume()
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
            self._unwatch()
            self.closed = True
            os.close(self._fd)
        self._close_spool()

    def _close_spool(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None
            self._spools.close(self.spool)


class Process:
    """One command. `finished(outcome, output)` is called once."""

    def __init__(
        self,
        run: Run,
        id_: int,
        spools: Spools,
        *,
        environment: dict[str, str],
        disk: Executor,
        finished: Callable[[Outcome, Output], None],
        outlet: Outlet | None,
        took: Callable[[int, bool, bool], None],
        watching: Watching,
    ) -> None:
        """Starts it. `outlet` gets its output as it comes; `took` is Inlet's."""
        self._id, self._agent = id_, str(spools.folder.parent)
        self._disk = disk
        self._since = orphans.now()
        self._finished = finished
        self._outlet = outlet
        self.inlet: Inlet | None = None
        self._over = False
        self._ended = False
        self._stopped = self._killed = False
        self._loop = asyncio.get_running_loop()
        self._watching = watching
        self._pipes: list[int] = []
        try:
            feeding = self._start(run, orphans.mark(environment, id_, self._agent))
        except (OSError, ValueError, Unable) as error:
            for fd in self._pipes:
                os.close(fd)
            self._over = True
            self._loop.call_soon(finished, _why_not(run, error), NO_OUTPUT)
            return
        if feeding is not None:
            self.inlet = Inlet(feeding, took)
            self.inlet.announce()
        watching.add(self._pidfd, self._exited)
        self._streams = [
            _Stream(number, fd, run.output_limit, spools=spools, id_=id_, outlet=outlet, watching=watching)
            for number, fd in zip((1, 2), self._pipes, strict=True)
        ]
        for stream in self._streams:
            stream.start(self._perhaps_done)
        if outlet is not None:
            outlet.on_room = self._resume

    def _start(self, run: Run, environment: dict[str, str]) -> int | None:
        """Fork and execute; the end of its standard input where that is fed. Raises OSError, ValueError, Unable."""
        theirs: list[int] = []
        stdin = feeding = None
        try:
            if run.feed:
                stdin, feeding = os.pipe2(os.O_CLOEXEC)
                theirs.append(stdin)
            elif run.input is not None:
                stdin = given_input(run.input)
                theirs.append(stdin)
            for _ in range(2):
                read, write = os.pipe2(os.O_CLOEXEC)
                self._pipes.append(read)
                theirs.append(write)
            with orphans.marked(self._id, self._agent):
                self.pid = execute(run, environment, (stdin, theirs[-2], theirs[-1]))
            try:
                self._pidfd = os.pidfd_open(self.pid)
            except OSError:  # out of descriptors: whoever can't be watched may not run
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise
        except BaseException:
            if feeding is not None:
                os.close(feeding)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        return feeding

    def _resume(self) -> None:
        for stream in self._streams:
            stream.resume()

    def stop(self, *, hard: bool) -> None:
        """Signal the whole process group: SIGTERM, or SIGKILL with `hard`."""
        if not self._over:
            self._stopped = True
            self._killed |= hard
            self._signal(signal.SIGKILL if hard else signal.SIGTERM)
            if not hard:
                self._disk.submit(orphans.end, self._id, self._agent, self._since, self.pid, hard=False)
            elif self._ended:
                self._loop.call_later(_LINGER, self._finish)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def _exited(self) -> None:
        self._watching.remove(self._pidfd)
        os.close(self._pidfd)
        self._ended = True
        if self.inlet is not None:
            self.inlet.close()
        for stream in self._streams:
            stream.drain()
        if self._outlet is not None:
            self._outlet.end()
        if not self._over:
            self._perhaps_done()
        # Where it was stopped, what it left has the same time to end as it had itself, until the certain signal.
        if not self._over and (self._killed or not self._stopped):
            self._loop.call_later(_LINGER, self._finish)

    def _perhaps_done(self) -> None:
        """Its pipes have ended as well."""
        if self._ended and not self._over and all(stream.closed for stream in self._streams):
            self._finish()

    def _finish(self) -> None:
        if self._over or not self._ended:
            return
        if self._outlet is not None:
            # What nobody reads yet stays in the outlet: what became of the command does not wait for it.
            self._outlet.flush()
        self._over = True
        if self._stopped:
            self._signal(signal.SIGKILL)
            ending = self._loop.run_in_executor(
                self._disk, lambda: orphans.end(self._id, self._agent, self._since, self.pid, hard=True)
            )
            ending.add_done_callback(lambda _: self._report())
        else:
            self._report()

    def _report(self) -> None:
        # Reaped at last: until here nobody else could have the number of its group, and a `stop` hit nobody else.
        _, status = os.waitpid(self.pid, 0)
        for stream in self._streams:
            stream.discard()
        code = os.waitstatus_to_exitcode(status)
        out, err = self._streams
        spool = ", ".join(str(stream.spool) for stream in self._streams if stream.is_whole())
        output = Output(bytes(out.kept), bytes(err.kept), out.total, err.total, spool)
        self._finished(Exited(code) if code >= 0 else Killed(-code), output)


def _why_not(run: Run, error: Exception) -> Outcome:
    if isinstance(error, Unable):
        return Refused(str(error))
    name = run.argv[0]
    if isinstance(error, OSError) and error.strerror:
        where = error.filename if isinstance(error.filename, str) and error.filename == run.cwd else name
        return FailedToStart(f"{where}: {error.strerror}")
    return FailedToStart(f"{name}: {error}")
