"""How a client reads what the service says."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from controller import api
from controller.run_api import BadFrame, RunReply, unpack_run_reply
from controller.session import Connection
from controller.status import CtlError, ExitStatus
from protocol.outcomes import Exited, Fold, Output

REPLIES: list[RunReply] = [
    api.Accepted(id=7, hosts={0: "h0", 3: "h3"}),
    api.Streamed(rank=0, stream=1, offset=0, data=b"a" * 3_000_000),
    api.InputRoom(upto=9),
    *[api.Streamed(rank=3, stream=2, offset=place, data=bytes([place % 256]) * 9_000) for place in range(300)],
    api.Folded(folds=(Fold(b"\x09", Exited(3), Output(out=b"x" * 700_000)),)),
    api.Late(folds=(Fold(b"\x01", Exited(0)),)),
    api.OnRecord(),
    api.Settled(),
]


class Server:
    """Sends bytes to the first who connects, so many at a time."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._thread = threading.Thread()

    def send(self, data: bytes, piece: int) -> None:
        """Begin to; then hang up."""

        def run() -> None:
            connection, _ = self._listener.accept()
            with connection:
                for begin in range(0, len(data), piece):
                    connection.sendall(data[begin : begin + piece])

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def close(self) -> None:
        self._thread.join(30)
        self._listener.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path / "client.sock")
    yield server
    server.close()


@pytest.mark.parametrize("piece", [1_021, 300_007, 1 << 24])
def test_replies_are_whole_however_they_come(server: Server, piece: int) -> None:
    server.send(b"".join(api.pack(reply) for reply in REPLIES), piece)
    with closing(Connection(server.path, unpack_run_reply)) as connection:
        assert [connection.receive() for _ in REPLIES] == REPLIES
        with pytest.raises(CtlError) as gone:
            connection.receive()
    assert gone.value.status is ExitStatus.NO_SERVICE


def test_both_readers_of_replies_agree_on_those_of_a_run() -> None:
    for reply in [*REPLIES, api.Failed(why="no", status=2)]:
        body = api.pack(reply)[api.LENGTH_BYTES :]
        assert unpack_run_reply(body) == api.unpack_reply(body) == reply


def test_a_run_is_answered_with_nothing_that_is_for_others() -> None:
    for reply in (api.Done(), api.Advanced(size=1, done={})):
        with pytest.raises(BadFrame):
            unpack_run_reply(api.pack(reply)[api.LENGTH_BYTES :])


def test_more_than_the_interface_allows_is_not_waited_for(server: Server) -> None:
    server.send((api.MAX_LENGTH + 1).to_bytes(api.LENGTH_BYTES, "big"), 4)
    with closing(Connection(server.path)) as connection, pytest.raises(BadFrame):
        connection.receive()
