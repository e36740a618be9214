"""`ctl push` on the command line. `quick` reads the usual forms of the same arguments."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from controller.ctl.bringing import Push, run
from controller.ctl.commands import Commands, Gathering, mistakes_of
from controller.ctl.options import Json, Quiet, ctl_of, selecting
from controller.selection import EVERYBODY, Selection

app = Commands()


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
    asked = Push(
        files=tuple(files),
        destination=destination,
        selection=selection,
        mode=mode,
        owner=owner,
        preserve=preserve,
        xattrs=xattrs,
        backup=backup,
        suffix=suffix,
        checksum=checksum,
        compress=compress,
        dry_run=dry_run,
        as_json=as_json,
        quiet=quiet,
    )
    raise typer.Exit(run(ctl_of(context), asked, mistakes_of(context)))
