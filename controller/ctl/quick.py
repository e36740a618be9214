"""The usual arguments of `ctl broadcast`, read without typer, whose import takes longer than the whole command.

What is not understood here at first sight (help, mistakes, rarer ways to write an option) is left to `ctl.broadcast`,
and a test holds both to the same reading.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from controller.ctl.running import LONGEST_TIMEOUT, Broadcast

FLAGS = {
    "-b": "gather",
    "--gather": "gather",
    "--stream": "stream",
    "--detach": "detach",
    "--json": "as_json",
    "-q": "quiet",
    "--quiet": "quiet",
}
LISTS = {"-w": "where", "--where": "where", "-x": "exclude", "--exclude": "exclude"}
VALUES = {"--timeout": "timeout", "--output-limit": "output_limit"}


@dataclass(frozen=True)
class Line:
    """A command line that was understood."""

    fleet: str | None
    debug: bool
    broadcast: Broadcast


def parse(arguments: Sequence[str], fleet: str | None) -> Line | None:
    """The broadcast that `arguments` ask for; None for all that typer is to read. `fleet` is the environment's."""
    left = list(arguments)
    debug = False
    while left and left[0] != "broadcast":
        name = left.pop(0)
        if name == "--debug":
            debug = True
        elif name == "--fleet" and left:
            fleet = left.pop(0)
        else:
            return None
    found = _options(left[1:]) if left else None
    return None if found is None else Line(fleet or None, debug, found)


def _options(left: list[str]) -> Broadcast | None:
    flags: dict[str, bool] = {}
    lists: dict[str, list[str]] = {"where": [], "exclude": []}
    values: dict[str, str] = {}
    while left and left[0].startswith("-"):
        name = left.pop(0)
        if name == "--":
            break
        if name in FLAGS:
            flags[FLAGS[name]] = True
        elif name in LISTS and left:
            lists[LISTS[name]].append(left.pop(0))
        elif name in VALUES and left:
            values[VALUES[name]] = left.pop(0)
        else:
            return None
    timeout = values.pop("timeout", None)
    if not left or (timeout is not None and not _is_timeout(timeout)):
        return None
    given: dict[str, Any] = {**flags, **values, "timeout": None if timeout is None else float(timeout)}
    return Broadcast(command=tuple(left), where=tuple(lists["where"]), exclude=tuple(lists["exclude"]), **given)


def _is_timeout(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) is not None and 0.001 <= float(text) <= LONGEST_TIMEOUT
