"""Starting the service where none runs, and waiting until it answers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from controller.session import Session
from controller.status import CtlError, ExitStatus

#: What a service may take to answer after it was started, in seconds: a second is usual.
_WITHIN = 20.0
#: How often it is looked at meanwhile, in seconds.
_LOOK_EVERY = 0.03


def ensure_service(fleet: str | None, *, listen: str | None = None, advertised: str | None = None) -> Session:
    """A session with the fleet's service, which is started where none runs. Raises CtlError."""
    session = Session(fleet)
    try:
        session.status()
        return session
    except CtlError as error:
        if error.status != ExitStatus.NO_SERVICE:
            raise
    directory = session.directory
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "controller.service", "--dir", str(directory)]
    if listen is not None:
        argv += ["--listen", listen]
    if advertised is not None:
        argv += ["--address", advertised]
    log = directory / "service.log"
    process = start_detached(argv, log)
    deadline = time.monotonic() + _WITHIN
    while True:
        try:
            session.status()
            return session
        except CtlError as error:
            if error.status != ExitStatus.NO_SERVICE:
                raise
        if process.poll() is not None:
            raise CtlError(f"the service did not start: {last_line(log)} (see {log})")
        if time.monotonic() > deadline:
            process.kill()
            raise CtlError(f"the service did not answer within {_WITHIN:g} s: see {log}")
        time.sleep(_LOOK_EVERY)


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
