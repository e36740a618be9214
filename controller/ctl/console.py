"""`ctl console`: a VM's serial console, through the tree."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from typing import Annotated

import typer

from controller.console import ConsoleEnd
from controller.ctl.commands import Commands
from controller.ctl.options import ctl_of
from controller.session import exit_status
from controller.spawn import on_record
from controller.status import CtlError, ExitStatus
from controller.terminal import Terminal
from protocol.limits import CONSOLE_EVERY
from protocol.outcomes import Cancelled, Outcome, describe, succeeded

app = Commands()

#: Ctrl-], as virsh(1) and telnet(1) have it.
_ESCAPE = b"\x1d"
_READ = 4096
#: Standard input that is no terminal has ended: the console is left when it shows nothing for so long, in seconds.
_STILL = 2.0


@app.command(
    "console",
    epilog="""\b
Examples:
  ctl console vm07
  ctl console vm07 --force          take it from whoever has it open
  echo 'uname -r' | ctl console vm07 --quiet""",
)
def console(
    *,
    context: typer.Context,
    vm: Annotated[str, typer.Argument(metavar="VM", help="The VM's name.")],
    deployment: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its deployment, where several have a VM of that name.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Take the console from whoever has it open.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Say nothing but what the console shows.")] = False,
) -> None:
    """Sit in front of a VM's serial console. Ctrl-] leaves it; the VM goes on.

    What is typed and shown goes through the tree, all that is typed signed. Where standard input is no terminal, what
    it has is typed, and the console is left once nothing more is shown for two seconds.
    """
    ctl = ctl_of(context)
    with ctl.session() as session:
        found, absent = on_record(session.status(), [vm], deployment)
        if absent:
            raise CtlError(f"{vm} is not on record: `ctl get vms` lists all", ExitStatus.NO_TARGET)
        end, host = session.console(next(iter(found)), vm, force=force)
    if not quiet:
        ctl.terminal.say(f"console of {vm} on {host}; Ctrl-] leaves it")
    outcomes = [outcome for outcome in _sit(end, ctl.terminal) if not (end.left and isinstance(outcome, Cancelled))]
    for outcome in outcomes:
        if not succeeded(outcome):
            ctl.terminal.say(f"{host}: {describe(outcome)}", bad=True)
    raise typer.Exit(exit_status(outcomes))


def _sit(end: ConsoleEnd, terminal: Terminal) -> list[Outcome]:
    """Until the console ends or whoever sits there leaves; what became of it. Raises CtlError."""
    outcomes: list[Outcome] = []
    problem: list[CtlError] = []
    over, wake = os.pipe()
    pieces = [0]

    def show(data: bytes) -> None:
        pieces[0] += 1
        terminal.write(data)
        terminal.flush_out()

    def listen() -> None:
        try:
            outcomes.extend(fold.outcome for folded in end.shown(show) for fold in folded.folds)
        except CtlError as error:
            problem.append(error)
        finally:
            os.close(wake)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    with _raw(sys.stdin.fileno()):
        _type(end, over, pieces)
    end.leave()
    listener.join(CONSOLE_EVERY)
    os.close(over)
    if problem:
        raise problem[0]
    return outcomes


def _type(end: ConsoleEnd, over: int, pieces: list[int]) -> None:
    """Type what comes on standard input, until the escape or the console's own end."""
    keyboard = [sys.stdin.fileno()]
    before = -1
    while True:
        readable, _, _ = select.select([over, *keyboard], [], [], CONSOLE_EVERY if keyboard else _STILL)
        if over in readable:
            return
        if not readable:
            if not keyboard and pieces[0] == before:
                return
            before = pieces[0]
            end.stay()
            continue
        data = os.read(keyboard[0], _READ)
        typed, escape, _ = data.partition(_ESCAPE)
        if typed:
            end.type(typed)
        if escape:
            return
        if not data:
            keyboard = []


@contextlib.contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """Every key as it is, for as long as this lasts; nothing to do where it is no terminal."""
    if not os.isatty(descriptor):
        yield
        return
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
