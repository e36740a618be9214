"""What hosts write, in files on this machine: one a host, and another for its standard error where it writes any."""

from __future__ import annotations

import os
from pathlib import Path

from controller.session import Piece
from controller.status import CtlError, ExitStatus
from protocol.outcomes import Output


class Outputs:
    """The files of one command. Those that an earlier one left for the same hosts go away before the first byte."""

    def __init__(self, directory: str) -> None:
        """Makes the directory. Raises CtlError (USAGE) where it can't be written to."""
        self._directory = Path(directory)
        #: How far each file has come, by host and stream, and how many bytes before that did not arrive.
        self._reached: dict[tuple[str, int], int] = {}
        self._gaps: dict[tuple[str, int], int] = {}
        #: Hosts whose files are there, and what went wrong first.
        self.hosts: set[str] = set()
        self.trouble = ""
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CtlError(f"-o {directory}: {error.strerror}", ExitStatus.USAGE) from error
        if not os.access(self._directory, os.W_OK | os.X_OK):
            raise CtlError(f"-o {directory}: it can't be written to", ExitStatus.USAGE)

    def take(self, piece: Piece) -> None:
        """Write what came, where it belongs."""
        self._begin(piece.host)
        key = (piece.host, piece.stream)
        reached = self._reached.get(key, 0)
        self._gaps[key] = self._gaps.get(key, 0) + max(0, piece.offset - reached)
        self._reached[key] = max(reached, piece.offset + len(piece.data))
        try:
            fd = os.open(self._path(*key), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                left = memoryview(piece.data)
                while left:
                    count = os.pwrite(fd, left, piece.offset + len(piece.data) - len(left))
                    left = left[count:]
            finally:
                os.close(fd)
        except OSError as error:
            self._failed(error)

    def end(self, host: str, output: Output) -> int:
        """The host is done: how many of the bytes that it wrote are not in its files."""
        self._begin(host)
        missing = 0
        for stream, total in ((1, output.out_total), (2, output.err_total)):
            key = (host, stream)
            missing += self._gaps.get(key, 0) + max(0, total - self._reached.get(key, 0))
        return missing

    def _path(self, host: str, stream: int) -> Path:
        return self._directory / (host if stream == 1 else f"{host}.err")

    def _begin(self, host: str) -> None:
        if host in self.hosts:
            return
        # The service takes in names of hosts alone; here is where another would do harm.
        if "/" in host or "\0" in host or host in ("", ".", ".."):
            raise CtlError(f"{host!r} is no name for a file: leave -o out")
        self.hosts.add(host)
        try:
            self._path(host, 2).unlink(missing_ok=True)
            self._path(host, 1).unlink(missing_ok=True)
            self._path(host, 1).touch()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        # The command goes on: what its other hosts write may still have room.
        self.trouble = self.trouble or f"{error.filename or self._directory}: {error.strerror}"
