"""The exit codes of `ctl`."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """What `ctl` ends with. The highest of several that apply to a command's hosts is not it: see `of_outcomes`."""

    OK = 0
    FAILED = 1  # a command failed on some host
    USAGE = 2
    UNREACHABLE = 3  # some hosts were lost or timed out
    NO_TARGET = 4
    REFUSED = 5  # refused for trust
    NO_SERVICE = 6
    INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class CtlError(Exception):
    """Something that a person must be told in one sentence: the cause and the next step."""

    def __init__(self, why: str, status: ExitStatus = ExitStatus.FAILED) -> None:
        super().__init__(why)
        self.status = status
