"""`ctl doctor`: what is wrong with a host, and what to do about it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from msgspec.structs import replace

from controller import doctor as meaning
from controller.ctl.commands import Commands
from controller.ctl.completing import complete_host
from controller.ctl.options import Json, Quiet, ctl_of, selecting
from controller.render import json_text
from controller.selection import EVERYBODY, Selection
from controller.status import CtlError, ExitStatus
from controller.terminal import Live

app = Commands()


@app.command(
    "doctor",
    epilog="""\b
Examples:
  ctl doctor h7
  ctl doctor h[0-15] -F ~/.ssh/cluster.conf -l root
  ctl doctor @failed
  ctl doctor h7 --json""",
)
@selecting(without=("labels", "pick"))
def doctor(
    *,
    context: typer.Context,
    hosts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="HOSTS...", help="Hosts, of the fleet or not yet: h1 h[3-7] @rack1.", autocompletion=complete_host
        ),
    ] = None,
    selection: Selection = EVERYBODY,
    ssh_config: Annotated[
        Path | None, typer.Option("-F", "--ssh-config", metavar="FILE", help="ssh's -F: another configuration file.")
    ] = None,
    login: Annotated[
        str | None, typer.Option("-l", "--login", metavar="USER", help="ssh's -l: log in as this user.")
    ] = None,
    connect_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="How long a host may take to answer on SSH.")
    ] = 10.0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Examine hosts, in the tree or not: SSH, Python, disk, agent, ports, key, clock, libvirt and version.

    One probe runs on each host over your own SSH, and changes nothing. What is bad comes with the next step. The exit
    code is 0 where all is well, and 1 where something is bad.
    """
    from controller.checkup import CheckupOptions, examine

    ctl = ctl_of(context)
    asked = replace(selection, where=(*(hosts or ()), *selection.where))
    if not asked.adds:
        raise CtlError("which hosts? Give names like h1 or h[3-7]", ExitStatus.NO_TARGET)
    names = ctl.session().choose(asked) or ()
    options = CheckupOptions(
        ssh_config=None if ssh_config is None else ssh_config.absolute(),
        login=login or "",
        connect_timeout=connect_timeout,
    )
    began = time.monotonic()
    with Live(ctl.terminal, lambda: f"examining {len(names)} hosts, {time.monotonic() - began:.0f} s", quiet=quiet):
        seen = examine(ctl.session(), names, options)
    found = {one.name: meaning.findings(one) for one in seen}
    if as_json:
        told = [
            {"host": name, "well": meaning.well(each), "findings": [_plain(one) for one in each]}
            for name, each in found.items()
        ]
        ctl.terminal.text(json_text(told))
    else:
        ctl.terminal.text("\n".join(meaning.report(name, each) for name, each in found.items()))
    raise typer.Exit(ExitStatus.OK if all(map(meaning.well, found.values())) else ExitStatus.FAILED)


def _plain(finding: meaning.Finding) -> dict[str, str]:
    return {"check": finding.check, "state": finding.state, "text": finding.text, "step": finding.step}
