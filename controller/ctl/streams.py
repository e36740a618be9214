"""Hosts' output as it comes, cut into lines that each name their host."""

from __future__ import annotations

from controller.session import Piece
from controller.terminal import Terminal
from protocol.outcomes import Output

#: A line that has grown to this is shown in parts: a host that never ends its line must not fill our memory.
MAX_LINE = 64 << 10
#: Colours that can be read on dark and on light: red to cyan, and their bright ones (ECMA-48, and xterm's additions).
_COLOURS = (31, 32, 33, 34, 35, 36, 91, 92, 93, 94, 95, 96)


class Streams:
    """The unfinished lines of all hosts."""

    def __init__(self, terminal: Terminal, *, labelled: bool = True) -> None:
        """Without `labelled` what hosts wrote is shown as it is, to the byte."""
        self._terminal = terminal
        self._labelled = labelled
        self._prefixes: dict[tuple[str, int], bytes] = {}
        self._unfinished: dict[tuple[str, int], bytearray] = {}
        self._seen: dict[tuple[str, int], int] = {}

    def take(self, piece: Piece) -> None:
        """Show the lines that end in this piece."""
        key = (piece.host, piece.stream)
        seen = self._seen.get(key, 0)
        self._gap(piece.host, piece.stream, piece.offset - seen)
        self._seen[key] = max(seen, piece.offset + len(piece.data))
        if not self._labelled:
            self._put(piece.stream, piece.data[max(0, seen - piece.offset) :])
            return
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
            self._gap(host, stream, total - self._seen.pop((host, stream), 0))

    def _gap(self, host: str, stream: int, count: int) -> None:
        if count > 0:
            name = "standard output" if stream == 1 else "standard error"
            self._terminal.say(f"{host}: {count} bytes of {name} did not arrive", bad=True)

    def show(self, host: str, stream: int, data: bytes) -> None:
        """All that a host wrote."""
        if self._labelled and data:
            self._show(host, stream, data)
        elif data:
            self._put(stream, data)

    def _show(self, host: str, stream: int, lines: bytes) -> None:
        prefix = self._prefix(host, stream)
        # Not splitlines(), which would cut at carriage returns too.
        self._put(stream, b"".join(prefix + line + b"\n" for line in lines.removesuffix(b"\n").split(b"\n")))

    def _prefix(self, host: str, stream: int) -> bytes:
        found = self._prefixes.get((host, stream))
        if found is None:
            text = f"{host}: "
            if self._terminal.colours(stream):
                from binascii import crc32

                # Of its name alone, so that a host has its colour in every command.
                text = f"\x1b[{_COLOURS[crc32(host.encode()) % len(_COLOURS)]}m{text}\x1b[0m"
            found = self._prefixes[host, stream] = text.encode()
        return found

    def _put(self, stream: int, data: bytes) -> None:
        if stream == 1:
            self._terminal.write(data)
            self._terminal.flush_out()
        else:
            self._terminal.say_bytes(data)
