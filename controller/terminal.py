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

#: What is read of a line that a person types: it says nothing but that it is there.
_LINE = 4096

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
        self.finish_line()
        if self.colours(1):
            text = f"{_BOLD}{text}{_PLAIN}"
        self.write(text.encode() + b"\n")

    def colours(self, stream: int) -> bool:
        """Whether what is written to standard output (1) or error (2) may have colours."""
        return self._colour and (self.out_is_terminal if stream == 1 else self._err.isatty())

    def finish_line(self) -> None:
        """End a line that data left unfinished."""
        if self._unfinished:
            self.write(b"\n")

    def flush_out(self) -> None:
        """Have the data out, unfinished lines as they are."""
        with self._lock:
            self._out.flush()

    def text(self, text: str) -> None:
        """Data that is text."""
        self.write(text.encode("utf-8", "backslashreplace"))

    def say(self, text: str, *, bad: bool = False) -> None:
        """A line on standard error. `bad` is for what went wrong."""
        if bad and self.colours(2):
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

    def say_from_handler(self, text: str) -> None:
        """A line on standard error, from a signal handler, which may have stopped another write in its middle."""
        line = (_CLEAR if self._live else "") + text + "\n"
        try:
            os.write(self._err.fileno(), line.encode("utf-8", "backslashreplace"))
        except (OSError, ValueError):
            # There is no descriptor below it, and so no buffer that could be in use: in tests.
            self._err.write(line)

    @property
    def columns(self) -> int:
        """How wide a live line may be; 0 where that is not known."""
        try:
            return os.get_terminal_size(self._err.fileno()).columns
        except OSError:
            return 0

    def draw(self, line: str) -> None:
        """Show `line` as the live line, as much of it as fits."""
        with self._lock:
            width = self.columns
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

    `line` is called from another thread: it may only read what a reader can't catch half changed. So is `more`, for
    each Enter on standard input: a line that stays.
    """

    def __init__(
        self,
        terminal: Terminal,
        line: Callable[[], str],
        *,
        quiet: bool = False,
        more: Callable[[], str] | None = None,
    ) -> None:
        self._terminal = terminal
        self._line = line
        self._more = more
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

        # A pipe, since Enter and the end are waited for together.
        over, end = os.pipe()
        self._terminal.share(threading.RLock())

        def run() -> None:
            wait = _FIRST_S
            while (woken := self._wait(over, wait)) is not over:
                if woken is not None and self._more is not None and os.read(woken, _LINE):
                    self._terminal.say(self._more())
                self._terminal.draw(self._line())
                wait = _EVERY_S

        def stop() -> None:
            os.close(end)
            thread.join()
            os.close(over)

        thread = threading.Thread(target=run, name="live line", daemon=True)
        thread.start()
        return stop

    def _wait(self, over: int, seconds: float) -> int | None:
        """Wait so long for the end, or for somebody who presses Enter: whichever has come."""
        import select

        keys = _keyboard() if self._more is not None else None
        ready, _, _ = select.select([over] if keys is None else [over, keys], [], [], seconds)
        return over if over in ready else keys if ready else None


def _keyboard() -> int | None:
    """Standard input where a person types there to us: a background process that reads its terminal is stopped."""
    try:
        return 0 if os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp() else None
    except OSError:
        return None
