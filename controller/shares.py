"""A share of so many, as people write it: `95%`, or a number. A percentage is rounded down, in all options alike."""

from __future__ import annotations

import re
from fractions import Fraction

from controller.status import CtlError, ExitStatus

_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%")
_NUMBER = re.compile(r"[0-9]{1,9}")


def share(option: str, text: str, total: int) -> int:
    """How many of `total` may be so, as for `--max-fail`: 2% of 10 is none, and a number may be above `total`.

    Raises CtlError (USAGE), naming `option`, where it is neither a percentage nor a number.
    """
    count = _count(text, total)
    if count is None:
        raise CtlError(f"{option} {text}: give a percentage like 10%, or a number", ExitStatus.USAGE)
    return count


def needed(option: str, text: str, total: int) -> int:
    """How many of `total` have to be so, as for `--min-up`: one at least, unless nothing is asked for.

    Raises CtlError (USAGE), naming `option`, also where it is more than all.
    """
    count = _count(text, total)
    if count is None or count > total:
        raise CtlError(f"{option} {text}: give a percentage like 95%, or a number of at most {total}", ExitStatus.USAGE)
    return count if count or not _above_nothing(text) else min(1, total)


def at_a_time(option: str, text: str, total: int) -> int:
    """How many of `total` go at a time, as for `--batch`: one at least.

    Raises CtlError (USAGE), naming `option`, also where it is none.
    """
    count = _count(text, total)
    if count is None or not _above_nothing(text):
        raise CtlError(f"{option} {text}: give a percentage like 10%, or a number of at least 1", ExitStatus.USAGE)
    return max(1, count)


def _count(text: str, total: int) -> int | None:
    percent = _PERCENT.fullmatch(text)
    if percent is not None and Fraction(percent[1]) <= 100:
        return int(Fraction(percent[1]) / 100 * total)
    return int(text) if _NUMBER.fullmatch(text) else None


def _above_nothing(text: str) -> bool:
    return Fraction(text.removesuffix("%")) > 0
