"""Labels of hosts, `rack=3`: what they may hold, and how a change of them is written. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from controller.status import CtlError, ExitStatus

# They are typed on command lines and in host sets, whose operators and spaces they must not have.
_KEY = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}"
_VALUE = r"[A-Za-z0-9._/-]{0,63}"
#: What is shown of a bad one.
_SHOWN = 80
_MAY = "labels have letters, digits, '.', '_', '/' and '-', at most 63 of them"


def check(put: Mapping[str, str], drop: Iterable[str] = ()) -> None:
    """Raises CtlError (USAGE) with all keys and values that can't be."""
    wrong = [f"{key[:_SHOWN]!r} is no key" for key in [*put, *drop] if not re.fullmatch(_KEY, key)]
    wrong += [f"{value[:_SHOWN]!r} is no value" for value in put.values() if not re.fullmatch(_VALUE, value)]
    if wrong:
        raise CtlError(f"{'; '.join(wrong)}: {_MAY}", ExitStatus.USAGE)


def parse(words: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """A change: `key=value` gives a label, `key-` takes it away. Raises CtlError (USAGE) with all that is wrong."""
    put: dict[str, str] = {}
    drop: list[str] = []
    wrong = []
    for word in words:
        key, sign, value = word.partition("=")
        if sign:
            put[key] = value
        elif word.endswith("-"):
            drop.append(word.removesuffix("-"))
        else:
            wrong.append(f"{word[:_SHOWN]!r} is neither key=value nor key-")
    wrong += [f"{key!r} is both given and taken away" for key in drop if key in put]
    try:
        check(put, drop)
    except CtlError as error:
        wrong.append(str(error))
    if wrong:
        raise CtlError("; ".join(wrong), ExitStatus.USAGE)
    return put, drop
