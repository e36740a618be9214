"""The journals of a host, one file for each thing that is being made or removed, and the taking back of those found.

    journal/<name>    lines as `agent.journal` has them; there only while somebody works on <name>

A line that says how to take something back is on disk before the thing is done (fsync), and the file
is gone from disk before anybody is told that all is well.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from agent import journal
from agent.journal import Step, Undo
from agent.lanes import finish


class Pages:
    """How journals get to disk. Blocking; tests bring one that ends the process at some line."""

    def append(self, path: Path, data: bytes, *, sync: bool) -> None:
        """Put bytes at the end of a file, made where there is none; durably where `sync` is set. Raises OSError."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = not path.exists()
        descriptor = os.open(path, flags | os.O_CREAT, 0o600)
        try:
            if os.write(descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if new and sync:
            _sync_directory(path.parent)

    def strike(self, path: Path) -> None:
        """Remove a file durably, where there is one."""
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Ledger:
    """The journals in `directory`. `undo` performs one undoing, and raises where it can't."""

    def __init__(self, directory: Path, undo: Callable[[Undo], Awaitable[object]], pages: Pages | None = None) -> None:
        self._directory = directory
        self._undo = undo
        self._pages = pages or Pages()

    def names(self) -> list[str]:
        """What was begun and has a journal, sorted."""
        try:
            return sorted(os.listdir(self._directory))
        except FileNotFoundError:
            return []

    def steps(self, name: str) -> tuple[Step, ...] | None:
        """The steps of an unfinished journal; None where there is none."""
        try:
            return journal.read((self._directory / name).read_bytes())
        except FileNotFoundError:
            return None

    def begin(self, name: str) -> Entry:
        """A journal for something that nobody else works on, and that has none."""
        return Entry(self._directory / name, self._undo, self._pages)

    def found(self, name: str, steps: Sequence[Step]) -> Entry:
        """A journal of an earlier time with these steps, to be ended or taken back."""
        entry = self.begin(name)
        entry.steps = list(steps)
        return entry


class Entry:
    """One journal while it is written."""

    def __init__(self, path: Path, undo: Callable[[Undo], Awaitable[object]], pages: Pages) -> None:
        self._path = path
        self._undo = undo
        self._pages = pages
        self.steps: list[Step] = []

    async def note(self, step: Step) -> None:
        """Write down a step that is about to be done."""
        # From here on it may be on disk, and so is to be taken back.
        self.steps.append(step)
        sync = bool(step.undo)
        await finish(asyncio.to_thread(self._pages.append, self._path, journal.line(step), sync=sync))

    async def end(self) -> None:
        """Everything is there."""
        await finish(asyncio.to_thread(self._pages.strike, self._path))

    async def take_back(self) -> str:
        """Take back what was noted, last first; why it could not be, in words. What was stays on record then, and
        what comes before it stays as it is: files don't go while the domain that has them is there."""
        for undo in journal.undoing(self.steps):
            try:
                await self._undo(undo)
            except Exception as error:
                return str(error) or type(error).__name__
        await self.end()
        return ""
