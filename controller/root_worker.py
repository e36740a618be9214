"""What the root does for its shell: it reads what is pushed, and hands the relay's news on. All else is hosts' work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from agent.batches import Batches
from agent.shell import Shell
from controller.sources import Sources
from protocol import events
from protocol.commands import Body, Feed, Leave
from protocol.messages import Deliver, Grant
from protocol.stream import Blob

#: Chunks that are read at a time: the first goes out when the last is read.
_READ_MOST = 8


class RootWorker:
    """The root's `agent.shell.Worker`, with the sources of all pushes."""

    def __init__(self, directory: Path, shell: Shell, tell: Callable[[events.Effect], None]) -> None:
        """`directory` keeps what pushes read; `tell` hears the relay's news."""
        self.sources = Sources(directory)
        self.tell = tell
        self._shell = shell
        self._reading: dict[int, Batches[int, list[tuple[bytes | None, bytes | None]]]] = {}
        self._disk = ThreadPoolExecutor(max_workers=2, thread_name_prefix="disk")

    def drop(self, id_: int) -> None:
        """A push is over."""
        self._reading.pop(id_, None)
        self._disk.submit(self.sources.drop(id_).close)

    def close(self) -> None:
        """End its threads."""
        self._disk.shutdown()

    def read(self, id_: int, index: int) -> None:
        """A chunk of a file that is being pushed."""
        reading = self._reading.get(id_)
        if reading is None:
            reads, told = partial(self._read, id_), partial(self._was_read, id_)
            reading = self._reading[id_] = Batches(self._disk, reads, told, most=_READ_MOST)
        reading.add(index)

    def _read(self, id_: int, indices: list[int]) -> list[tuple[bytes | None, bytes | None]]:
        """On a thread."""
        return [self.sources.read_or_none(id_, index) for index in indices]

    def _was_read(
        self, id_: int, indices: list[int], read: list[tuple[bytes | None, bytes | None]] | None, _: object
    ) -> None:
        both = zip(indices, read or [(None, None)] * len(indices), strict=True)
        self._shell.was_read(id_, [(index, blob, packed) for index, (blob, packed) in both])

    def start(self, id_: int, body: Body, ttl: float | None) -> None:
        """The root does no work of its own."""
        raise TypeError(f"the root was told to {body} (command {id_}, {ttl})")

    def stop(self, id_: int, *, hard: bool) -> None:
        """The root does no work of its own."""
        raise TypeError(f"the root was told to stop command {id_} (hard: {hard})")

    def keep(self, outcome: events.Keep) -> None:
        """The root has no outcomes of its own."""

    def load(self, id_: int, signature: bytes) -> None:
        """The root has no outcomes of its own."""

    def type(self, feed: Feed) -> None:
        """The root has no consoles of its own."""

    def granted(self, id_: int, grant: Grant) -> None:
        """The root grants, it is granted nothing."""

    def pour(self, id_: int, offset: int, data: bytes, *, last: bool) -> None:
        """The root feeds, it is fed nothing."""

    def forget(self, ids: tuple[int, ...]) -> None:
        """The root has no outcomes of its own."""

    def store(self, id_: int, chunks: Sequence[tuple[int, Blob]]) -> None:
        """The root stores nothing."""

    def headed(self, id_: int) -> None:
        """The root has its files."""

    def complete(self, id_: int) -> None:
        """The root has its files."""

    def broken(self, id_: int, why: str, *, keep: bool) -> None:
        """The root has its files."""

    def arrived(self) -> None:
        """The root attaches to nobody."""

    def depart(self, leave: Leave) -> None:
        """The root does not depart on commands."""

    def save_plan(self, delivery: Deliver) -> None:
        """The root makes the plan."""
