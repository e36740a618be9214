"""What is being pushed, on the service node: open while the push lasts, and found again after a restart."""

from __future__ import annotations

from pathlib import Path

from agent.packing import Packer
from agent.source import Source
from protocol.commands import Stream


class Sources:
    """The sources of pushes by the command's number; each is noted in `directory` until it is dropped."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._sources: dict[int, Source] = {}
        self._packers: dict[int, Packer] = {}

    def __contains__(self, id_: int) -> bool:
        return id_ in self._sources

    def add(self, id_: int, source: Source) -> None:
        """A push begins."""
        self._directory.mkdir(mode=0o700, exist_ok=True)
        source.save(self._directory / str(id_))
        self._sources[id_], self._packers[id_] = source, Packer()

    def load(self, id_: int, stream: Stream) -> None:
        """A push goes on that was begun before this service. Raises OSError where its files are not to be had."""
        self._sources[id_], self._packers[id_] = Source.load(self._directory / str(id_), stream), Packer()

    def prune(self, kept: set[int]) -> None:
        """Forget the notes of all pushes but these."""
        for note in self._directory.iterdir() if self._directory.is_dir() else ():
            if not note.name.isdecimal() or int(note.name) not in kept:
                note.unlink(missing_ok=True)

    def stream(self, id_: int) -> Stream | None:
        """The stream of a push that goes on."""
        source = self._sources.get(id_)
        return None if source is None else source.stream

    def read(self, id_: int, index: int) -> tuple[bytes, bytes | None]:
        """A chunk, and the frame that it is to travel as where that pays. Blocks; raises OSError."""
        source = self._sources[id_]
        blob = source.read(index)
        packer = self._packers.get(id_) if source.stream.compress else None
        return blob, None if packer is None else packer.pack(blob)

    def read_or_none(self, id_: int, index: int) -> tuple[bytes | None, bytes | None]:
        """The same; of neither where the chunk can't be read, or the push is over."""
        try:
            return self.read(id_, index)
        except (OSError, KeyError):
            return None, None

    def drop(self, id_: int) -> Source:
        """The push is over; whoever gets its source closes it, on a thread that no chunk of it is read in."""
        (self._directory / str(id_)).unlink(missing_ok=True)
        self._packers.pop(id_, None)
        return self._sources.pop(id_)
