"""The ways in which `ctl` shows what hosts wrote: each is told what happens, and shows at the end what is left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from controller import render
from controller.ctl.following import Following
from controller.ctl.streams import Streams
from controller.session import Happening, Piece, Result
from controller.status import CtlError
from controller.terminal import Terminal

if TYPE_CHECKING:
    from controller.selection import Chooser


class View:
    """One way to show a command. `pieces` says whether output is wanted as it comes."""

    pieces = False
    #: How many different outputs were shown, where they were told apart.
    outputs: int | None = None

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    def note(self, happening: Happening) -> None:
        """Something happened."""

    def end(self, following: Following) -> None:
        """The command is over, or nobody waits for it any more."""
        following.show_failures()


class Gathered(View):
    """Equal outputs once, under the hosts that gave them; standard error apart."""

    def __init__(self, terminal: Terminal, name: render.Name = render.label) -> None:
        super().__init__(terminal)
        self._name = name

    def end(self, following: Following) -> None:
        self.show(following)
        self.show_errors(following)
        self.show_late(following)
        following.show_failures()

    def show(self, following: Following) -> None:
        """What was written to standard output."""
        found = render.outputs(following.results, following.order, 1)
        self.outputs = len(found)
        for hosts, data in found:
            self._block(self._name(hosts), data)

    def _block(self, title: str, data: bytes) -> None:
        for text in (render.RULE, title, render.RULE):
            self._terminal.header(text)
        self._terminal.write(data)

    def show_errors(self, following: Following) -> None:
        """What was written to standard error."""
        for hosts, data in render.outputs(following.results, following.order, 2):
            self._error_block(f"{self._name(hosts)}: standard error", data)

    def _error_block(self, title: str, data: bytes) -> None:
        for text in (render.RULE, title, render.RULE):
            self._terminal.say(text)
        self._terminal.say_bytes(data if data.endswith(b"\n") else data + b"\n")

    def show_late(self, following: Following) -> None:
        """What hosts wrote whose answer came after they had been given up."""
        for hosts, data in render.outputs(following.late, following.order, 1):
            self._block(f"{self._name(hosts)}: answered later", data)
        for hosts, data in render.outputs(following.late, following.order, 2):
            self._error_block(f"{self._name(hosts)}: standard error, answered later", data)


class Merged(Gathered):
    """Hosts whose output and standard error are equal, with both below them."""

    def end(self, following: Following) -> None:
        found = render.merged(following.results, following.order)
        self.outputs = len(found)
        for hosts, out, err in found:
            self._block(self._name(hosts), out)
            self._terminal.finish_line()
            self._terminal.write(err)
        following.show_failures()


class Differences(Gathered):
    """The most common output, and what differs from it elsewhere."""

    def show(self, following: Following) -> None:
        found = render.differences(following.results, following.order, self._name)
        self.outputs = len(found)
        for hosts, data in found:
            self._block(hosts, data)


class ByHost(View):
    """Each host's lines, in the order of hosts."""

    def __init__(self, terminal: Terminal, *, labelled: bool) -> None:
        super().__init__(terminal)
        self._labelled = labelled

    def end(self, following: Following) -> None:
        streams = Streams(self._terminal, labelled=self._labelled)
        for host, output in render.each(following.results, following.order):
            for stream, data in ((1, output.out), (2, output.err)):
                streams.show(host, stream, data)
        following.show_failures()


class Stream(View):
    """Lines as they come."""

    pieces = True

    def __init__(self, terminal: Terminal, *, labelled: bool) -> None:
        super().__init__(terminal)
        self._streams = Streams(terminal, labelled=labelled)

    def note(self, happening: Happening) -> None:
        if isinstance(happening, Piece):
            self._streams.take(happening)
        elif isinstance(happening, Result):
            for host in happening.hosts:
                self._streams.end(host, happening.output)

    def end(self, following: Following) -> None:
        following.show_failures(shortened=False)


class Json(View):
    """One list, at the end."""

    def end(self, following: Following) -> None:
        following.show_json()


class Lines(View):
    """One JSON object a line, as it comes."""

    def __init__(self, terminal: Terminal, *, pieces: bool) -> None:
        super().__init__(terminal)
        self.pieces = pieces

    def note(self, happening: Happening) -> None:
        if isinstance(happening, Piece):
            self._show(render.piece_object(happening))
        elif isinstance(happening, Result):
            order = {host: place for place, host in enumerate(happening.hosts)}
            for found in render.result_objects([happening], order):
                self._show(found)

    def _show(self, found: object) -> None:
        self._terminal.text(render.json_line(found))
        self._terminal.flush()

    def end(self, following: Following) -> None:
        """All has been said."""


class Directory(View):
    """Files of what hosts write, and nothing of it here."""

    pieces = True

    def __init__(self, terminal: Terminal, directory: str) -> None:
        """Raises CtlError (USAGE) where the directory can't be written to."""
        super().__init__(terminal)
        from controller.ctl.outdir import Outputs

        self._files = Outputs(directory)
        self._directory = directory

    def note(self, happening: Happening) -> None:
        if isinstance(happening, Piece):
            self._files.take(happening)
        elif isinstance(happening, Result):
            for host in happening.hosts:
                missing = self._files.end(host, happening.output)
                if missing:
                    self._terminal.say(f"{host}: {missing} bytes did not arrive", bad=True)

    def end(self, following: Following) -> None:
        following.show_failures(shortened=False)
        if self._files.trouble:
            raise CtlError(f"-o {self._directory}: {self._files.trouble}; the files there are not whole")


def by_group(chooser: Chooser) -> render.Name:
    """Names hosts by the groups that they make up."""

    def name(hosts: Sequence[str]) -> str:
        folded = chooser.regroup(hosts)
        return folded if len(hosts) == 1 else f"{folded} ({len(hosts)})"

    return name
