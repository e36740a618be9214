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


class Mistakes:
    """Takes what is wrong with an input, a part of it at a time (`with`), to raise all of it as one."""

    def __init__(self) -> None:
        self._found: list[CtlError] = []

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        wrong = isinstance(error, CtlError) and error.status in (ExitStatus.USAGE, ExitStatus.NO_TARGET)
        if wrong:
            self.add(error)  # type: ignore[arg-type]  # it is one
        # Whoever made a mistake is told of it, service or not.
        return wrong or (bool(self._found) and isinstance(error, CtlError))

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._found)

    def add(self, error: CtlError) -> None:
        """One more."""
        self._found.append(error)

    def check(self) -> None:
        """Raise CtlError with all, where there are any."""
        if self._found:
            told = dict.fromkeys(str(error) for error in self._found)
            raise CtlError("; ".join(told), self._found[0].status)
