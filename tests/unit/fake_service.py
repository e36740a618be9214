"""The other end of the client socket, for tests of `ctl`: it answers as a test tells it to, over a real socket."""

from __future__ import annotations

import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from controller import api
from protocol import ranks
from protocol.outcomes import NO_OUTPUT, Exited, Fold, Outcome, Output

#: What a test may wait for the other side.
_WITHIN_S = 30.0

_Request = TypeVar("_Request", bound=api.Request)


class Client:
    """One connection: what came on it, and what is sent back."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def send(self, *replies: api.Reply) -> None:
        """Send replies. A client that has gone is no error."""
        with suppress(OSError):
            for reply in replies:
                self._connection.sendall(api.pack(reply))

    def receive(self) -> api.Request | None:
        """The next request; None where the client has gone."""
        prefix = self._exactly(api.LENGTH_BYTES)
        body = self._exactly(api.length_of(prefix)) if prefix else b""
        return api.unpack_request(body) if body else None

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                more = self._connection.recv(count - len(data))
            except OSError:
                return b""
            if not more:
                return b""
            data += more
        return data


class FakeService:
    """Listens where a fleet's service does. `requests` is all that was asked, in order."""

    def __init__(self, home: Path, fleet: str = "default") -> None:
        self.home = home
        directory = home / fleet
        directory.mkdir(parents=True)
        self.requests: list[api.Request] = []
        self.failures: list[BaseException] = []
        self._answers: dict[type, Callable[[api.Request, Client], None]] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(str(directory / "client.sock"))
        self._socket.listen()
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def on(self, request: type[_Request], answer: Callable[[_Request, Client], None]) -> None:
        """Answer such requests so."""

        def checked(received: api.Request, client: Client) -> None:
            assert isinstance(received, request)
            answer(received, client)

        self._answers[request] = checked

    def replies(self, request: type[api.Request], *replies: api.Reply) -> None:
        """Answer such requests with these."""
        self.on(request, lambda _, client: client.send(*replies))

    def asked(self, request: type[_Request]) -> list[_Request]:
        """The requests of this kind that came."""
        return [received for received in self.requests if isinstance(received, request)]

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            connection.settimeout(_WITHIN_S)
            self._open.append(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            client = Client(connection)
            request = client.receive()
            if request is not None:
                self.requests.append(request)
                self._answers[type(request)](request, client)
        except BaseException as error:  # the test hears of it from `close`
            self.failures.append(error)
        finally:
            connection.close()

    def close(self) -> None:
        """End it; raises what went wrong in an answer."""
        # shutdown() wakes accept(), which close() alone does not.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._accepting.join(_WITHIN_S)
        for thread in self._threads:
            thread.join(_WITHIN_S)
        for failure in self.failures:
            raise failure


@contextmanager
def fake_service() -> Iterator[FakeService]:
    """A service in a directory of its own, with a path that is short enough for a socket (unix(7): 108 bytes)."""
    home = Path(tempfile.mkdtemp(prefix="ctl-"))
    try:
        service = FakeService(home)
        try:
            yield service
        finally:
            service.close()
    finally:
        shutil.rmtree(home)


def fold(members: Iterable[int], outcome: Outcome | None = None, output: Output = NO_OUTPUT) -> Fold:
    """An outcome of hosts by rank; without one they exited with 0."""
    return Fold(ranks.pack(ranks.union(members)), Exited(0) if outcome is None else outcome, output)


def names(count: int) -> dict[int, str]:
    """Hosts h0, h1, … by rank."""
    return {rank: f"h{rank}" for rank in range(count)}


def printed(text: bytes, error: bytes = b"") -> Output:
    """What a command wrote, within its budget."""
    return Output(text, error, len(text), len(error))


def host(rank: int, *, up: bool = True, **fields: object) -> api.HostStatus:
    """A host as the service tells of it."""
    known: dict[str, object] = {
        "name": f"h{rank}",
        "rank": rank,
        "site": "",
        "address": f"198.18.0.{rank + 1}",
        "up": up,
        "parent": None,
        "planned_parent": None,
        "since_s": 60.0,
        "why": "" if up else "no word from it for 7 s",
        "digest": "",
        "facts": {"uid": "0"},
        "health": None,
        "health_age_s": None,
    }
    return api.HostStatus(**(known | fields))  # type: ignore[arg-type]  # a test says what differs


def status(*hosts: api.HostStatus, vms: Iterable[api.VmStatus] = ()) -> api.Status:
    """A fleet as the service tells of it."""
    return api.Status(
        fleet="default-0", version="0.1.0", pid=4711, uptime_s=3725.0, fanout=32, hosts=hosts, vms=tuple(vms)
    )


def vm(name: str, at: str, **fields: object) -> api.VmStatus:
    """A VM as the service tells of it."""
    known: dict[str, object] = {
        "name": name,
        "deployment": "infra",
        "host": at,
        "ip": "198.18.4.1",
        "mac": "00:16:3E:12:04:01",
        "vcpus": 1,
        "memory_mib": 1024,
        "state": None,
        "age_s": None,
    }
    return api.VmStatus(**(known | fields))  # type: ignore[arg-type]  # a test says what differs
