"""Where `ctl` writes: data on standard output, all that is about it on standard error.

While a person watches, a live line stands below.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

#: A live line comes only when a command takes so long, so that quick ones do not flicker.
_FIRST_S = 0.4
#: And is drawn anew this often, which reads as steady and costs nothing.
_EVERY_S = 0.15

#: Columns of a terminal that does not say how many it has.
_WIDTH = 80

_CLEAR = "\r\x1b[K"
_RED, _BOLD, _PLAIN = "\x1b[31m", "\x1b[1m", "\x1b[0m"


class Terminal:
    """Standard output in bytes, and standard error in text."""

    def __init__(self) -> None:
        self._out = sys.stdout.buffer
        self._err = sys.stderr
        self.out_is_terminal = sys.stdout.isatty()
        usable = os.environ.get("TERM", "") not in ("", "dumb")
        #: Whether somebody sees standard error as it comes.
        self.watched = sys.stderr.isatty() and usable
        # https://no-color.org: any value but an empty one.
        self._colour = usable and not os.environ.get("NO_COLOR")
        # A real one comes with the thread of a live line.
        self._lock: AbstractContextManager[Any] = nullcontext()
        self._live = False
        self._unfinished = False

    def share(self, lock: AbstractContextManager[Any]) -> None:
        """From now on another thread writes too, under this lock."""
        self._lock = lock

    def write(self, data: bytes) -> None:
        """Data, as it is."""
        if data:
            with self._lock:
                self._clear()
                self._out.write(data)
                self._unfinished = not data.endswith(b"\n")

    def header(self, text: str) -> None:
        """A line among the data, which ends an unfinished one first."""
        if self._unfinished:
            self.write(b"\n")
        if self._colour and self.out_is_terminal:
            text = f"{_BOLD}{text}{_PLAIN}"
        self.write(text.encode() + b"\n")

    def text(self, text: str) -> None:
        """Data that is text."""
        self.write(text.encode("utf-8", "backslashreplace"))

    def say(self, text: str, *, bad: bool = False) -> None:
        """A line on standard error. `bad` is for what went wrong."""
        if bad and self._colour and self._err.isatty():
            text = f"{_RED}{text}{_PLAIN}"
        self.say_bytes(text.encode(self._err.encoding or "utf-8", "backslashreplace") + b"\n")

    def say_bytes(self, data: bytes) -> None:
        """Bytes on standard error, as they are, after all data that came before them."""
        with self._lock:
            self._clear()
            self._finish_line()
            self._out.flush()
            self._err.flush()
            self._err.buffer.write(data)
            self._err.buffer.flush()

    def draw(self, line: str) -> None:
        """Show `line` as the live line, as much of it as fits."""
        with self._lock:
            try:
                width = os.get_terminal_size(self._err.fileno()).columns
            except OSError:
                width = 0
            self._finish_line()
            self._out.flush()
            self._err.write(_CLEAR + line[: (width or _WIDTH) - 1])
            self._err.flush()
            self._live = True

    def clear(self) -> None:
        """Take the live line away."""
        with self._lock:
            self._clear()

    def flush(self) -> None:
        """Have all that was written out. On a terminal a last line without an end gets one."""
        with self._lock:
            self._clear()
            self._finish_line()
            self._out.flush()
            self._err.flush()

    def _clear(self) -> None:
        if self._live:
            self._live = False
            self._err.write(_CLEAR)
            self._err.flush()

    def _finish_line(self) -> None:
        # Elsewhere the bytes are somebody's data, and stay as they are.
        if self._unfinished and self.out_is_terminal:
            self._out.write(b"\n")
            self._unfinished = False


class Live:
    """While it is entered, and a person watches, a line on standard error says what `line()` returns.

    `line` is called from another thread: it may only read what a reader can't catch half changed.
    """

    def __init__(self, terminal: Terminal, line: Callable[[], str], *, quiet: bool = False) -> None:
        self._terminal = terminal
        self._line = line
        self._stop: Callable[[], None] | None = None
        self._shown = terminal.watched and not quiet

    def __enter__(self) -> Live:
        if self._shown:
            self._stop = self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stop is not None:
            self._stop()
            self._terminal.clear()

    def _start(self) -> Callable[[], None]:
        import threading  # an import that a command which nobody watches is spared

        over = threading.Event()
        self._terminal.share(threading.RLock())

        def run() -> None:
            wait = _FIRST_S
            while not over.wait(wait):
                self._terminal.draw(self._line())
                wait = _EVERY_S

        def stop() -> None:
            over.set()
            thread.join()

        thread = threading.Thread(target=run, name="live line", daemon=True)
        thread.start()
        return stop
