"""How a command of `ctl broadcast` is to run, from what people write: environment, limits, script, standard input."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from controller.status import CtlError, ExitStatus
from protocol.limits import MAX_SCRIPT

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30}


def how(
    *,
    cwd: str | None,
    env: Sequence[str],
    user: str | None,
    nice: int | None,
    limits: Sequence[str],
    kill_after: float | None,
    script: str | None,
) -> dict[str, Any]:
    """The arguments of `Session.run` that say so. Raises CtlError (USAGE) with all mistakes."""
    wrong: list[str] = []
    variables, bounds = _variables(env, wrong), _limits(limits, wrong)
    text = _script(script, wrong) if script is not None else None
    if wrong:
        raise CtlError("; ".join(wrong), ExitStatus.USAGE)
    return {
        "cwd": cwd,
        "env": variables,
        "user": user or "",
        "nice": nice or 0,
        "limits": bounds,
        "kill_after": kill_after,
        "script": text,
    }


def _variables(given: Sequence[str], wrong: list[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not name or not equals:
            wrong.append(f"--env {text}: write NAME=VALUE")
        found[name] = value
    return found


def _limits(given: Sequence[str], wrong: list[str]) -> dict[str, int]:
    found = {}
    for text in ",".join(given).split(",") if given else ():
        match = re.fullmatch(r"([a-z]{2,20})=(?:(none)|([0-9]{1,18})([kmg]?))", text.lower())
        if match is None:
            wrong.append(f"--limit {text}: write NAME=NUMBER, like nofile=1024, as=2g, or NAME=none")
        else:
            found[match[1]] = -1 if match[2] else int(match[3]) << _UNITS[match[4]]
    return found


def _script(path: str, wrong: list[str]) -> bytes | None:
    try:
        with Path(path).open("rb") as file:
            text = file.read(MAX_SCRIPT + 1)
    except OSError as error:
        wrong.append(f"--script {path}: {error.strerror}")
        return None
    if not 0 < len(text) <= MAX_SCRIPT:
        wrong.append(
            f"--script {path}: a script has 1 byte to {MAX_SCRIPT >> 10} KiB; push a larger one with `ctl push`, and "
            "run it there"
        )
    return text


def standard_input(source: BinaryIO, *, whole: bool) -> bytes | BinaryIO:
    """What goes with the command, where there is little of it; else the file, which is sent as hosts take it.

    With `whole` it must be little. Raises CtlError (USAGE) where it is not.
    """
    info = os.fstat(source.fileno())
    little = stat.S_ISREG(info.st_mode) and info.st_size <= MAX_SCRIPT
    if not whole and not little:
        return source
    data = source.read(MAX_SCRIPT + 1)
    if len(data) > MAX_SCRIPT:
        raise CtlError(
            f"--detach takes at most {MAX_SCRIPT >> 10} KiB of standard input along: push a file, and read it there",
            ExitStatus.USAGE,
        )
    return data
