"""Starting the service where none runs, and waiting until it answers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from agent.identity import is_running, write_atomically
from agent.version import VERSION
from controller.session import Session
from controller.status import CtlError, ExitStatus

#: What a service may take to answer after it was started, in seconds: a second is usual.
_WITHIN = 20.0
#: How often it is looked at meanwhile, in seconds.
_LOOK_EVERY = 0.03


class _Addresses(msgspec.Struct, frozen=True, kw_only=True):
    """Where the service listens, and what hosts are told; None leaves it to the service."""

    listen: str | None = None
    advertised: str | None = None


def ensure_service(fleet: str | None, *, listen: str | None = None, advertised: str | None = None) -> Session:
    """A session with the fleet's service: it is started where none runs, and again where another version runs.

    Whoever starts it as well at the same time has the same one. `listen` and `advertised` are kept for later starts.
    Raises CtlError.
    """
    session = Session(fleet)
    directory = session.directory
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        if session.status().version == VERSION:
            return session
        # Agents keep what is under way, and attach again by themselves.
        session.shutdown()
        if not _wait_until_gone(session):
            return session
    except CtlError as error:
        if error.status != ExitStatus.NO_SERVICE:
            raise
    addresses = _remember(directory, listen, advertised)
    argv = [sys.executable, "-m", "controller.service", "--dir", str(directory)]
    if addresses.listen is not None:
        argv += ["--listen", addresses.listen]
    if addresses.advertised is not None:
        argv += ["--address", addresses.advertised]
    log = directory / "service.log"
    process = start_detached(argv, log)
    deadline = time.monotonic() + _WITHIN
    while True:
        try:
            if session.status().pid != process.pid:
                process.kill()  # another was quicker; this one would begin when that one ends
                process.wait()
            disown(process)
            return session
        except CtlError as error:
            if error.status != ExitStatus.NO_SERVICE:
                raise
        # Another may have been quicker, whose service takes a moment more to answer.
        if process.poll() is not None and not is_running(directory, "service.lock"):
            raise CtlError(f"the service did not start: {last_line(log)} (see {log})")
        if time.monotonic() > deadline:
            process.kill()
            raise CtlError(f"the service did not answer within {_WITHIN:g} s: see {log}")
        time.sleep(_LOOK_EVERY)


def _remember(directory: Path, listen: str | None, advertised: str | None) -> _Addresses:
    """The addresses to start with: what is given now, else what was given before, which is kept."""
    file = directory / "addresses.json"
    try:
        before = msgspec.json.decode(file.read_bytes(), type=_Addresses)
    except FileNotFoundError:
        before = _Addresses()
    now = _Addresses(listen=listen or before.listen, advertised=advertised or before.advertised)
    if now != before:
        write_atomically(file, msgspec.json.encode(now))
    return now


def _wait_until_gone(session: Session) -> bool:
    """Wait until a service that was told to end has let go of its lock; false where another has started one of this
    version meanwhile. Raises CtlError."""
    directory = session.directory
    deadline = time.monotonic() + _WITHIN
    while is_running(directory, "service.lock"):
        with suppress(CtlError):
            if session.status().version == VERSION:
                return False
        if time.monotonic() > deadline:
            raise CtlError(f"the old service did not end within {_WITHIN:g} s: see {directory / 'service.log'}")
        time.sleep(_LOOK_EVERY)
    return True


def disown(process: subprocess.Popen[bytes]) -> None:
    """A process that outlives this one is nobody's to wait for; else Popen warns of it when it is collected."""
    process.returncode = 0


def start_detached(argv: list[str], log: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a process that outlives this one, writing to `log`."""
    with log.open("ab") as file:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            cwd="/",
            env={**os.environ, "PYTHONPATH": _import_path()} | (environment or {}),
        )


def _import_path() -> str:
    """Where this very code is found, for a checkout that is not installed."""
    here = str(Path(__file__).resolve().parent.parent)
    return os.pathsep.join(part for part in (here, os.environ.get("PYTHONPATH", "")) if part)


def last_line(log: Path) -> str:
    """The last line of a log, or that there is none."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it said nothing"
