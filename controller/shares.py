"""A share of so many, as people write it: `95%`, or a number."""

from __future__ import annotations

import re
from fractions import Fraction

from controller.status import CtlError, ExitStatus

_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%")
_NUMBER = re.compile(r"[0-9]{1,9}")


def share(text: str, total: int, option: str) -> int:
    """How many of `total` that is: a percentage is rounded down, but one above 0 is one at least.

    Raises CtlError (USAGE), naming `option`, where it is neither a percentage nor a number of at most `total`.
    """
    percent = _PERCENT.fullmatch(text)
    if percent is not None and Fraction(percent[1]) <= 100:
        part = Fraction(percent[1]) / 100
        return max(int(part * total), 1 if part and total else 0)
    if _NUMBER.fullmatch(text) and int(text) <= total:
        return int(text)
    raise CtlError(f"{option} {text}: give a percentage like 95%, or a number of at most {total}", ExitStatus.USAGE)
