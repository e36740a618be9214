"""What was begun on this host and not ended: each step with what undoes it, as lines of text. Pure.

A step is written down before it is done. Whoever finds an unfinished journal takes back, last step first, what may or
may not have been done: each undoing is one that finds nothing to do where its step was not reached. The removal of a
VM is written in the same way, so that one that was cut short is finished.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import TypeAlias

import msgspec


class RemoveFiles(msgspec.Struct, frozen=True, kw_only=True, tag="remove files", forbid_unknown_fields=True):
    """Remove all files of the VM `name`."""

    name: str


class RemoveDomain(msgspec.Struct, frozen=True, kw_only=True, tag="remove domain", forbid_unknown_fields=True):
    """Stop and undefine the domain `name`, where it has this UUID and is this agent's."""

    name: str
    uuid: str


class RemoveLink(msgspec.Struct, frozen=True, kw_only=True, tag="remove link", forbid_unknown_fields=True):
    """Remove the network interface `name`, where it carries this agent's alias."""

    name: str


class LetGo(msgspec.Struct, frozen=True, kw_only=True, tag="let go", forbid_unknown_fields=True):
    """Remove the files of the VM `name` where it has left this host; where it is here, let it run on."""

    name: str
    uuid: str


class RemoveSockets(msgspec.Struct, frozen=True, kw_only=True, tag="remove sockets", forbid_unknown_fields=True):
    """Remove these Unix sockets of a move, where they are there."""

    paths: tuple[str, ...]


Undo: TypeAlias = RemoveFiles | RemoveDomain | RemoveLink | LetGo | RemoveSockets


class Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that is about to be done. `undo` is what takes it back, in this order; nothing where that of an earlier
    step does. `last` says that with it the whole is there, and what comes after is only to strike the journal out.
    `arrives`: of a VM that comes from another host; once it is here it is not taken back, for it may be gone there."""

    does: str
    undo: tuple[Undo, ...] = ()
    last: bool = False
    arrives: bool = False


def line(step: Step) -> bytes:
    """A step as one line, with a check sum: a host that loses power may have written half of it, or zeros."""
    text = msgspec.json.encode(step)
    return b"%08x %s\n" % (zlib.crc32(text), text)


def read(data: bytes) -> tuple[Step, ...]:
    """The steps of a journal, in their order.

    Reading stops at the first line that is not whole: it was not on disk, so its step was not begun.
    """
    steps: list[Step] = []
    for written in data.splitlines(keepends=True):
        check, _, text = written.rstrip(b"\n").partition(b" ")
        if not written.endswith(b"\n") or check != b"%08x" % zlib.crc32(text):
            break
        try:
            steps.append(msgspec.json.decode(text, type=Step))
        except msgspec.DecodeError:
            break
    return tuple(steps)


def undoing(steps: Iterable[Step]) -> tuple[Undo, ...]:
    """What takes steps back: the last one's first, each once."""
    return tuple(dict.fromkeys(undo for step in reversed(list(steps)) for undo in step.undo))
