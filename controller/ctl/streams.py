"""Hosts' output as it comes, cut into lines that each name their host."""

from __future__ import annotations

from controller.render import clean
from controller.session import Piece
from controller.terminal import Terminal
from protocol.outcomes import Output

#: A line that has grown to this is shown in parts: a host that never ends its line must not fill our memory.
MAX_LINE = 64 << 10


class Streams:
    """The unfinished lines of all hosts."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._unfinished: dict[tuple[str, int], bytearray] = {}
        self._seen: dict[tuple[str, int], int] = {}

    def take(self, piece: Piece) -> None:
        """Show the lines that end in this piece."""
        key = (piece.host, piece.stream)
        seen = self._seen.get(key, 0)
        self._gap(piece.host, piece.stream, piece.offset - seen)
        self._seen[key] = max(seen, piece.offset + len(piece.data))
        held = self._unfinished.setdefault(key, bytearray())
        held += piece.data[max(0, seen - piece.offset) :]
        end = held.rfind(b"\n") + 1
        if end:
            self._show(piece.host, piece.stream, bytes(held[:end]))
            del held[:end]
        if len(held) >= MAX_LINE:
            self._show(piece.host, piece.stream, bytes(held) + b"\n")
            held.clear()

    def end(self, host: str, output: Output) -> None:
        """The host's command is over: show its last lines, which may have no end."""
        for stream, total in ((1, output.out_total), (2, output.err_total)):
            held = self._unfinished.pop((host, stream), None)
            if held:
                self._show(host, stream, bytes(held) + b"\n")
            self._gap(host, stream, total - self._seen.pop((host, stream), 0), output.spool)

    def _gap(self, host: str, stream: int, count: int, spool: str = "") -> None:
        if count > 0:
            name = "standard output" if stream == 1 else "standard error"
            where = f"; all of it is on the host: {clean(spool)}" if spool else ""
            self._terminal.say(f"{host}: {count} bytes of {name} did not arrive{where}", bad=True)

    def _show(self, host: str, stream: int, lines: bytes) -> None:
        prefix = f"{host}: ".encode()
        # Not splitlines(), which would cut at carriage returns too.
        text = b"".join(prefix + line + b"\n" for line in lines.removesuffix(b"\n").split(b"\n"))
        if stream == 1:
            self._terminal.write(text)
            self._terminal.flush()
        else:
            self._terminal.say_bytes(text)
