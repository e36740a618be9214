"""Waiting for what a test expects, with a deadline, in place of sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Long enough not to load the machine, short enough not to be felt.
_POLL_SECONDS = 0.02


def wait_until(condition: Callable[[], T], deadline_s: float, what: str) -> T:
    """Call ``condition`` until its value is true, and return that value.

    Raises AssertionError, with ``what`` was waited for and the last value, when ``deadline_s`` seconds have passed.
    """
    deadline = time.monotonic() + deadline_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {deadline_s:g} s in vain for {what}; last seen: {value!r}")
        time.sleep(_POLL_SECONDS)
