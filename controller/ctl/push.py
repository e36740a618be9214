"""`ctl push`: files and directories to many hosts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from controller import render
from controller.asking_files import PushOptions, push_request
from controller.ctl.commands import Commands, Gathering, mistakes_of
from controller.ctl.following import Following, Pushed
from controller.ctl.options import Json, Quiet, ctl_of, selecting
from controller.ctl.said import show_said
from controller.selection import EVERYBODY, Selection
from controller.session import Job
from controller.status import CtlError, ExitStatus
from controller.terminal import Terminal

app = Commands()


def mode_bits(text: str | None) -> int | None:
    """Permission bits in octal. Raises CtlError (USAGE)."""
    if text is None:
        return None
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o7777:
        raise CtlError(f"--mode {text}: give a mode in octal, like 644 or 0755", ExitStatus.USAGE)
    return mode


def _owner(text: str) -> str:
    if (text and not re.fullmatch(r"[^:\s]*(:[^:\s]*)?", text)) or text == ":":
        raise typer.BadParameter(f"{text!r} is no owner, like root, www-data:adm or :adm")
    return text


def _suffix(text: str) -> str:
    if "/" in text or "\0" in text or len(text) > 64:
        raise typer.BadParameter(f"{text!r} is no end of a file's name, like ~ or .old")
    return text


@app.command(
    "push",
    cls=Gathering,
    epilog="""\b
Examples:
  ctl push app.tar.gz /opt/              a destination that ends in / is a directory
  ctl push -w h[0-31] hosts /etc/hosts   another one is the file's name there
  ctl push site motd.d /srv/             directories with all that is in them: /srv/site, /srv/motd.d
  ctl push --dry-run site /srv/          say who would change what, and change nothing
  ctl push --mode 755 --owner root:adm tool /usr/local/bin/
  ctl push --backup ntp.conf /etc/       the old one stays as /etc/ntp.conf~""",
)
@selecting()
def push(
    *,
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files and directories on this machine.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="Where they go on hosts: a path from / on.")],
    selection: Selection = EVERYBODY,
    mode: Annotated[
        str | None, typer.Option(metavar="OCTAL", help="Files' permissions on hosts (default: those they have here).")
    ] = None,
    owner: Annotated[
        str,
        typer.Option(metavar="USER[:GROUP]", help="Whose they are on hosts (default: the agent's).", callback=_owner),
    ] = "",
    preserve: Annotated[
        bool, typer.Option("--preserve", help="Keep owner, group and all times, by name where the host has it.")
    ] = False,
    xattrs: Annotated[bool, typer.Option("--xattrs", help="Keep extended attributes and access lists.")] = False,
    backup: Annotated[
        bool, typer.Option("--backup", help="Keep what is replaced under its name and the suffix.")
    ] = False,
    suffix: Annotated[str, typer.Option("--suffix", metavar="TEXT", help="For --backup.", callback=_suffix)] = "~",
    checksum: Annotated[
        Literal["always", "size-mtime"],
        typer.Option("--checksum", help="When a file counts as there already: same bytes, or same size and time."),
    ] = "always",
    compress: Annotated[bool, typer.Option("--compress/--no-compress", help="Compress where it pays.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing: say what would change where.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Bring files and directories to all hosts at once.

    They go from host to host, are verified by digest, and each replaces what is there in one step: a host has the old
    file or the new one, never half of it. What is there already is not sent: only its mode and time are made those that
    it has here. What is there and not in the push stays. Symbolic links in directories arrive as links, holes as holes.
    A push that was interrupted goes on where it was, when it is given again. Ctrl-C ends it on all hosts, and leaves
    nothing half behind.
    """
    wrong = mistakes_of(context)
    bits = None
    with wrong:
        bits = mode_bits(mode)
    options: PushOptions = {
        "mode": bits,
        "owner": owner,
        "preserve": preserve,
        "xattrs": xattrs,
        "backup": suffix if backup else "",
        "checksum": checksum,
        "compress": compress,
        "dry_run": dry_run,
    }
    with wrong:
        if destination.startswith("@/"):
            raise CtlError(f"{destination!r} is the agents' own: give a path from / on", ExitStatus.USAGE)
    with wrong:
        push_request(files, destination, None, **options)
    ctl = ctl_of(context)
    with ctl.session() as session:
        with wrong:
            hosts = session.choose(selection, known=bool(wrong))
        wrong.check()
        job = session.push(files, destination, hosts, **options)
        raise typer.Exit(follow(job, ctl.terminal, as_json=as_json, quiet=quiet))


def follow(job: Job, terminal: Terminal, *, as_json: bool = False, quiet: bool = False) -> int:
    """Show a push until its end. The exit code."""
    following = Following(job, terminal, quiet=quiet, announce=True)
    pushed = Pushed(following)
    following.run(pushed.line, pushed.note)
    if as_json:
        following.show_json()
    else:
        show_said(following)
        following.show_failures()
        if not quiet:
            # A push that can't go on anywhere is no fault of the hosts that passed this on.
            told = {getattr(result.outcome, "why", "") for result in following.results}
            bypassed = ((whom, why, by) for (whom, why), by in pushed.bypassed.items() if why not in told)
            for whom, why, by in bypassed:
                terminal.say(f"{whom} was bypassed by {render.label(by)}: {render.clean(why)}")
    return following.end()
