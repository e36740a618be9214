"""For the end of a match that names every case."""

from __future__ import annotations

from typing import NoReturn


def assert_never(value: NoReturn) -> NoReturn:
    """What the type checker shows can't be reached.

    `typing.assert_never` came with Python 3.11, and hosts may have 3.10.
    """
    raise AssertionError(f"a case that nobody thought of: {value!r}")
