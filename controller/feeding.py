"""A client's standard input on its way to the service: read in a thread, and no faster than the hosts take it."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import BinaryIO, Protocol

from controller import api
from controller.status import CtlError
from protocol.limits import INPUT_PIECE


class Sender(Protocol):
    """What requests go out on."""

    def send(self, request: api.Request) -> None:
        """Send one. Raises CtlError where nobody is there any more."""


class Feeder:
    """Sends what can be read from `source`. The thread ends with its end, with the connection, or with the process."""

    def __init__(self, source: BinaryIO, connection: Sender) -> None:
        self._source = source
        self._connection = connection
        self._room = 0
        self._sent = 0
        self._changed = threading.Condition()
        self._closed = False
        # A thread that waits for a terminal can't be stopped: the process does not wait for it.
        threading.Thread(target=self._run, name="stdin", daemon=True).start()

    def allow(self, upto: int) -> None:
        """The service takes input up to this offset."""
        with self._changed:
            self._room = max(self._room, upto)
            self._changed.notify()

    def close(self) -> None:
        """Send nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        # read1() returns what there is: a line that somebody typed goes at once.
        read = getattr(self._source, "read1", self._source.read)
        with suppress(CtlError, ValueError):  # the service is gone, which is told elsewhere; or the source is closed
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._sent < self._room)
                    most = min(INPUT_PIECE, self._room - self._sent)
                    if self._closed:
                        return
                try:
                    data = read(most)
                except OSError:
                    data = b""
                self._sent += len(data)
                self._connection.send(api.InputData(data=data, last=not data))
                if not data:
                    return
