"""`ctl job ID --output HOST`: all that a host wrote, from the record where that has it, else from the host's spool."""

from __future__ import annotations

from contextlib import closing

from controller.ctl.context import Ctl
from controller.session import Job, Piece, Result, Session
from controller.status import CtlError, ExitStatus
from controller.terminal import Terminal
from protocol.outcomes import describe, succeeded


def show_output(ctl: Ctl, number: int, host: str) -> int:
    """Write it as it is, standard output and error apart. The exit code; raises CtlError."""
    with ctl.session() as session:
        recorded = _recorded(session, number, host)
        output = recorded.output
        whole = {1: len(output.out) == output.out_total, 2: len(output.err) == output.err_total}
        for stream, data in ((1, output.out), (2, output.err)):
            if whole[stream]:
                _write(ctl.terminal, stream, data)
        if not all(whole.values()):
            _fetch(session, ctl.terminal, number, host, whole)
    ctl.terminal.flush()
    return ExitStatus.OK


def _recorded(session: Session, number: int, host: str) -> Result:
    with closing(session.job(number, wait=False)) as job:
        for happening in job:
            if isinstance(happening, Result) and host in happening.hosts:
                return happening
    raise CtlError(f"{host} has no outcome of job {number}: `ctl job {number}` says who has", ExitStatus.NO_TARGET)


def _fetch(session: Session, terminal: Terminal, number: int, host: str, whole: dict[int, bool]) -> None:
    with closing(session.output(number, host)) as job:
        _take(job, terminal, host, whole)


def _take(job: Job, terminal: Terminal, host: str, whole: dict[int, bool]) -> None:
    arrived = {1: 0, 2: 0}
    for happening in job:
        if isinstance(happening, Piece):
            if not whole[happening.stream]:
                arrived[happening.stream] += len(happening.data)
                _write(terminal, happening.stream, happening.data)
        elif isinstance(happening, Result):
            if not succeeded(happening.outcome):
                raise CtlError(f"{host}: {describe(happening.outcome)}", ExitStatus.FAILED)
            totals = {1: happening.output.out_total, 2: happening.output.err_total}
            if any(arrived[stream] < totals[stream] for stream in arrived if not whole[stream]):
                raise CtlError(f"{host}: the link broke, and not all arrived; ask again", ExitStatus.UNREACHABLE)


def _write(terminal: Terminal, stream: int, data: bytes) -> None:
    if stream == 1:
        terminal.write(data)
    else:
        terminal.say_bytes(data)
