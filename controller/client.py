"""A fleet's service as its clients reach it: where fleets are, a question and its answer, a command that goes on."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, TypeVar

from controller import run_api
from controller.running import Connection, Running
from controller.status import CtlError

if TYPE_CHECKING:
    from pathlib import Path

    from controller import api

_Reply = TypeVar("_Reply")


def fleets_directory() -> Path:
    """Where fleets live: `$CANOPY_HOME`, else `canopy` in the XDG state directory (XDG Base Directory
    Specification)."""
    from pathlib import Path

    return Path(_home())


def fleet_directory(fleet: str | None = None) -> Path:
    """The directory of a fleet; without a name `$CANOPY_FLEET`, else `default`."""
    return fleets_directory() / _fleet(fleet)


def _home() -> str:
    # Texts, not Paths, on the way of every command: pathlib takes 3 ms to load.
    found = os.environ.get("CANOPY_HOME")
    if found:
        return found
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")  # noqa: PTH111  see above
    return f"{state}/canopy"


def _fleet(fleet: str | None) -> str:
    return fleet or os.environ.get("CANOPY_FLEET") or "default"


class Client:
    """The service of one fleet. Raises CtlError (with `.status`) for whatever goes wrong."""

    def __init__(self, fleet: str | None = None) -> None:
        """`fleet` is a fleet's name; None takes `$CANOPY_FLEET`, else `default`."""
        self._directory = f"{_home()}/{_fleet(fleet)}"
        self._socket = f"{self._directory}/client.sock"

    @property
    def directory(self) -> Path:
        """The fleet's directory on this machine."""
        from pathlib import Path

        return Path(self._directory)

    def _ask(self, request: api.Request, wanted: type[_Reply]) -> _Reply:
        connection = Connection(self._socket)
        try:
            connection.send(request)
            reply = connection.receive()
        finally:
            connection.close()
        if not isinstance(reply, wanted):
            raise CtlError(f"the service answered with a {type(reply).__name__}, not a {wanted.__name__}")
        return reply

    def _job(self, request: api.Request) -> Running[Any]:
        unpack = run_api.unpack_run_reply if isinstance(request, run_api.RunOn) else None
        connection = Connection(self._socket, unpack)
        connection.send(request)
        reply = connection.receive()
        if not isinstance(reply, run_api.Accepted):
            connection.close()
            raise CtlError(f"the service answered with a {type(reply).__name__}, not with a command's number")
        return Running(reply, connection)
