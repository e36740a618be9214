"""`ctl push`: one file to many hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from controller import render
from controller.ctl.following import Following, Pushed
from controller.ctl.options import Json, Quiet, ctl_of, selecting
from controller.selection import EVERYBODY, Selection
from controller.session import Job
from controller.status import CtlError, ExitStatus
from controller.terminal import Terminal

app = typer.Typer(rich_markup_mode=None, add_completion=False)


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise typer.BadParameter(f"{text!r} is no mode in octal, like 644 or 0755")
    return mode


@app.command(
    "push",
    epilog="""\b
Examples:
  ctl push app.tar.gz /opt/              a destination that ends in / is a directory
  ctl push -w h[0-31] hosts /etc/hosts
  ctl push --mode 755 tool /usr/local/bin/tool""",
)
@selecting()
def push(
    *,
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file on this machine.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Where it goes on hosts: a path from / on.")],
    selection: Selection = EVERYBODY,
    mode: Annotated[
        str | None, typer.Option(metavar="OCTAL", help="Its permissions on hosts (default: those it has here).")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bring a file to all hosts at once.

    It goes from host to host, is verified by digest, and replaces what is there in one step: a host has the old file or
    the new one, never half of it. Where it is there already, nothing is sent.
    """
    if not destination.startswith("/"):
        raise CtlError(f"{destination!r} is no path from / on, and hosts have no working directory", ExitStatus.USAGE)
    bits = None if mode is None else _mode(mode)
    ctl = ctl_of(context)
    with ctl.session() as session:
        hosts = session.choose(selection)
        job = session.push(file, destination, hosts, mode=bits)
        raise typer.Exit(follow(job, ctl.terminal, as_json=as_json, quiet=quiet))


def follow(job: Job, terminal: Terminal, *, as_json: bool = False, quiet: bool = False) -> int:
    """Show a push until its end. The exit code."""
    following = Following(job, terminal, quiet=quiet, announce=True)
    pushed = Pushed(following)
    following.run(pushed.line, pushed.note)
    if as_json:
        following.show_json()
    else:
        good = [result for result in following.results if result.ok]
        for what, hosts in render.grouped(good, lambda result: result.stdout, following.order):
            terminal.text(f"{render.label(hosts)}: {render.clean(what.decode('utf-8', 'replace').strip())}\n")
        following.show_failures()
    return following.end()
