"""What every command of `ctl` is given, and what it makes of Ctrl-C and of errors. Without typer: see `quick`."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import TYPE_CHECKING

import msgspec

from controller.selection import read_text as read
from controller.session import Session
from controller.status import CtlError, ExitStatus
from controller.terminal import Terminal

if TYPE_CHECKING:
    from pathlib import Path


class Ctl(msgspec.Struct, frozen=True):
    """The global options, and where to write."""

    fleet: str | None
    debug: bool
    terminal: Terminal

    def session(self) -> Session:
        """The fleet's service."""
        return Session(self.fleet)


class Interruptible:
    """While it is entered, the first Ctrl-C calls `cancel` and the second is a KeyboardInterrupt.

    A handler, since an exception in the middle of a reply would lose the place in what the service says.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._before: Callable[[int, FrameType | None], object] | int | None = None
        self.interrupted = False

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self._cancel()

    def __enter__(self) -> Interruptible:
        try:
            self._before = signal.signal(signal.SIGINT, self._handle)
        except ValueError:
            # Not in the main thread, which is the only one that signals come to.
            self._before = None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def tell(error: CtlError | KeyboardInterrupt) -> int:
    """Say what went wrong, and return the exit code for it."""
    if isinstance(error, KeyboardInterrupt):
        return ExitStatus.INTERRUPTED
    Terminal().say(f"ctl: {error}", bad=True)
    return error.status


def read_text(path: Path) -> str:
    """A file that a person wrote; `-` is standard input. Raises CtlError where it can't be read."""
    return read(str(path))
