"""The usual arguments of `ctl broadcast` and `ctl push`, read without typer, whose import takes longer than the whole
command.

What is not understood here at first sight (help, mistakes, rarer options) is left to `ctl.broadcast` and `ctl.push`,
and tests hold both to the same reading.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from controller.ctl.running import LONGEST_TIMEOUT, Broadcast
from controller.selection import Selection

if TYPE_CHECKING:
    from controller.ctl.bringing import Push

FLAGS = {
    "-b": "gather",
    "--gather": "gather",
    "-B": "merge",
    "--merge": "merge",
    "-L": "by_host",
    "--by-host": "by_host",
    "--diff": "diff",
    "--stream": "stream",
    "--json": "as_json",
    "--ndjson": "ndjson",
    "-N": "no_label",
    "--no-label": "no_label",
    "-r": "regroup",
    "--regroup": "regroup",
    "-S": "max_code",
    "--max-code": "max_code",
    "--detach": "detach",
    "-q": "quiet",
    "--quiet": "quiet",
}
VALUES = {"--output-limit": "output_limit", "-o": "outdir", "--outdir": "outdir", "--batch": "batch"}
TIMEOUTS = ("-u", "--timeout")
#: Options of Selection.
SELECTING_FLAGS = {"-a": "everybody", "--all": "everybody"}
SELECTING_LISTS = {
    "-w": "where",
    "--where": "where",
    "-x": "exclude",
    "--exclude": "exclude",
    "-g": "groups",
    "--group": "groups",
    "-X": "exclude_groups",
    "--exclude-group": "exclude_groups",
    "-l": "labels",
    "--label": "labels",
    "--hostfile": "hostfile",
}
#: What is left to typer: rare, or refused with a sentence.
LEFT = (
    "--cwd",
    "--env",
    "--user",
    "--script",
    "--stdin",
    "--kill-after",
    "--nice",
    "--limit",
    "--pick",
    "--max-fail",
    "-f",
    "--fanout",
    "-t",
    "--connect-timeout",
)


#: The same of a push, whose options may also stand behind its files.
PUSH_FLAGS = {
    "--preserve": ("preserve", True),
    "--xattrs": ("xattrs", True),
    "--backup": ("backup", True),
    "--compress": ("compress", True),
    "--no-compress": ("compress", False),
    "--dry-run": ("dry_run", True),
    "--json": ("as_json", True),
    "-q": ("quiet", True),
    "--quiet": ("quiet", True),
}
PUSH_VALUES = {"--mode": "mode"}
PUSH_LEFT = ("--owner", "--suffix", "--checksum", "--pick")


class Line(msgspec.Struct, frozen=True):
    """A command line that was understood."""

    fleet: str | None
    debug: bool
    asked: Broadcast | Push


def parse(arguments: Sequence[str], fleet: str | None) -> Line | None:
    """What `arguments` ask for; None for all that typer is to read. `fleet` is the environment's."""
    left = list(arguments)
    debug = False
    while left and left[0] not in ("broadcast", "push"):
        name = left.pop(0)
        if name == "--debug":
            debug = True
        elif name == "--fleet" and left:
            fleet = left.pop(0)
        else:
            return None
    if not left:
        return None
    found = _push(left[1:]) if left[0] == "push" else _options(left[1:])
    return None if found is None else Line(fleet or None, debug, found)


def _options(left: list[str]) -> Broadcast | None:
    given: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    while left and left[0].startswith("-"):
        name = left.pop(0)
        if name == "--":
            given["vector"] = True
            break
        if name in FLAGS:
            given[FLAGS[name]] = True
        elif _selects(name, left, chosen):
            pass
        elif not left:
            return None
        elif name in VALUES:
            given[VALUES[name]] = left.pop(0)
        elif name in TIMEOUTS and _is_timeout(left[0]):
            given["timeout"] = float(left.pop(0))
        else:
            return None
    if not left:
        return None
    return Broadcast(command=tuple(left), selection=Selection(**chosen), **given)


def _selects(name: str, left: list[str], chosen: dict[str, Any]) -> bool:
    """Whether this is an option of Selection, with its value where it has one: that is `chosen` then."""
    if name in SELECTING_FLAGS:
        chosen[SELECTING_FLAGS[name]] = True
    elif name in SELECTING_LISTS and left:
        field = SELECTING_LISTS[name]
        chosen[field] = (*chosen.get(field, ()), left.pop(0))
    else:
        return False
    return True


def _push(left: list[str]) -> Push | None:
    given: dict[str, Any] = {}
    chosen: dict[str, Any] = {}
    words: list[str] = []
    while left:
        name = left.pop(0)
        if name == "--":
            words += left
            break
        if not name.startswith("-") or name == "-":
            words.append(name)
        elif name in PUSH_FLAGS:
            field, value = PUSH_FLAGS[name]
            given[field] = value
        elif _selects(name, left, chosen):
            pass
        elif name in PUSH_VALUES and left:
            given[PUSH_VALUES[name]] = left.pop(0)
        else:
            return None
    if len(words) < 2:
        return None
    from pathlib import Path

    from controller.ctl.bringing import Push

    files = tuple(map(Path, words[:-1]))
    return Push(files=files, destination=words[-1], selection=Selection(**chosen), **given)


def _is_timeout(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) is not None and 0.001 <= float(text) <= LONGEST_TIMEOUT
