"""A request under way: its connection to the service, and what comes of a command."""

from __future__ import annotations

# The C half of `socket`, which has all that a client uses. The other half makes enumerations of some 300 numbers: a
# tenth of the start of a quick command.
import _socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Generic, TypeAlias, TypeVar, cast

from controller import run_api
from controller.later import Later
from controller.results import Followed, Happening, Result
from controller.status import CtlError, ExitStatus

if TYPE_CHECKING:
    from controller import api
    from controller.feeding import Feeder
else:
    api = Later("controller.api")

#: One read from the client socket.
_READ = 1 << 20
#: And what it begins with: most commands are done in that, and each page of it has its price.
_FIRST = 64 << 10

#: What iterating over a job gives.
H_co = TypeVar("H_co", covariant=True)


class Running(Followed, Generic[H_co]):
    """A running command: iterate over it for what happens.

    Leaving it (`close`, or the end of a `with`) cancels what still runs, unless it was begun detached or is only
    followed.
    """

    def __init__(self, accepted: api.Accepted, connection: Connection) -> None:
        super().__init__(accepted.id, accepted.hosts, accepted.what)
        self._connection = connection
        self._feeder: Feeder | None = None

    def __enter__(self) -> Running[H_co]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[H_co]:
        """What happens, as it happens, until every target has its outcome; of a job that was asked for without waiting
        what is on record."""
        while not self.over:
            # The service sends what was asked for, and nothing else: the type says what that is.
            yield from cast(Iterator[H_co], self.take(self._connection.receive()))
            if self._feeder is not None:
                self._feeder.allow(self.input_room)
        self.close()

    def cancel(self) -> None:
        """Ask all hosts to stop; go on iterating for their outcomes."""
        if not self.over:
            self._connection.send(run_api.Cancel())

    def close(self) -> None:
        """Leave it."""
        if self._feeder is not None:
            self._feeder.close()
        self._connection.close()

    def feed(self, source: BinaryIO) -> None:
        """Send what can be read from `source` to the command, once: its standard input."""
        # Threads cost a command that has no input a hundredth of a second.
        import threading

        from controller.feeding import Feeder

        self._connection.sending = threading.RLock()  # a Ctrl-C may come in the middle of a send
        self._feeder = Feeder(source, self._connection)

    def results(self) -> list[Result]:
        """All results, equal ones in one, in the order of their first hosts."""
        return self.merged(cast(Iterator[Happening], iter(self)))


#: A running command of any kind.
Job: TypeAlias = Running[Happening]


class Connection:
    """One request's connection to the service."""

    def __init__(self, path: str, unpack: Callable[[memoryview], api.Reply] | None = None) -> None:
        """Connects. `unpack` reads what may be answered. Raises CtlError with NO_SERVICE where nobody listens."""
        self._unpack = unpack or api.unpack_reply
        self._socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        #: What was received, and which part of it was not asked for yet.
        self._buffer = memoryview(bytearray(_FIRST))
        self._taken = self._read = 0
        #: Input goes out from a thread of its own.
        self.sending: AbstractContextManager[object] = nullcontext()
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            fleet = path.split("/")[-2]
            raise CtlError(
                f"no service runs for this fleet ({fleet}): start one with `ctl up`", ExitStatus.NO_SERVICE
            ) from error

    def send(self, request: api.Request) -> None:
        """Send a request."""
        try:
            with self.sending:
                self._socket.sendall(run_api.pack(request))
        except OSError as error:
            raise CtlError("the service went away: see its log, then `ctl up` again", ExitStatus.NO_SERVICE) from error

    def receive(self) -> api.Reply:
        """The next reply. Raises CtlError where the service said Failed, or is gone."""
        length = run_api.length_of(self._exactly(run_api.LENGTH_BYTES))
        reply = self._unpack(self._exactly(length))
        if isinstance(reply, run_api.Failed):
            self.close()
            raise CtlError(reply.why, ExitStatus(reply.status))
        return reply

    def _exactly(self, count: int) -> memoryview:
        """The next so many bytes, until the next call."""
        held = self._read - self._taken
        if not held or self._taken + count > len(self._buffer):
            # To its beginning: no more is copied of a stream, which can be a gigabyte, than a message's beginning.
            room = self._buffer if count <= len(self._buffer) else memoryview(bytearray(max(count, _READ)))
            room[:held] = self._buffer[self._taken : self._read]
            self._buffer, self._taken, self._read = room, 0, held
        while self._read < self._taken + count:
            try:
                got = self._socket.recv_into(self._buffer[self._read :])
            except ConnectionError:  # it was killed with this request unread
                got = 0
            if not got:
                self.close()
                raise CtlError("the service went away: see its log, then `ctl up` again", ExitStatus.NO_SERVICE)
            self._read += got
        self._taken += count
        return self._buffer[self._taken - count : self._taken]

    def close(self) -> None:
        """End the connection; a command that still runs on it is cancelled."""
        self._socket.close()
